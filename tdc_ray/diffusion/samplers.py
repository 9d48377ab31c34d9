"""The samplers: one row for each, with the timesteps it visits and its diffusers scheduler.

A plan reads the timesteps, so frameworks are imported where a scheduler is made, not here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.sampler import Sampler, SamplerConfig
from tdc_ray.diffusion.schedule import NoiseProcess

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """One sampler."""

    timesteps: Callable[[int, SamplerConfig], list[int]]
    """From the number of training timesteps: where the network is evaluated, noisiest first."""

    scheduler: Callable[[DiffusionConfig, SamplerConfig], "SchedulerMixin"]


def _leading(num_train_timesteps: int, sampler: SamplerConfig) -> list[int]:
    """Space the timesteps as diffusers' ``leading``: evenly, the last at the offset."""
    stride = num_train_timesteps // sampler.num_inference_steps
    steps = reversed(range(sampler.num_inference_steps))
    return [step * stride + sampler.steps_offset for step in steps]


def _second_twice(num_train_timesteps: int, sampler: SamplerConfig) -> list[int]:
    """Visit the second timestep twice: PNDM makes its first step again with what it found."""
    steps = _leading(num_train_timesteps, sampler)
    return steps[:2] + steps[1:]


def _ddim(diffusion: DiffusionConfig, sampler: SamplerConfig) -> "SchedulerMixin":
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **_shared(diffusion, sampler),
        clip_sample=sampler.clip_sample,
        set_alpha_to_one=sampler.set_alpha_to_one,
    )


def _ddpm(diffusion: DiffusionConfig, sampler: SamplerConfig) -> "SchedulerMixin":
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        **_shared(diffusion, sampler),
        clip_sample=sampler.clip_sample,
        variance_type="learned_range" if diffusion.learned_sigma else "fixed_small",
    )


def _pndm(diffusion: DiffusionConfig, sampler: SamplerConfig) -> "SchedulerMixin":
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        **_shared(diffusion, sampler),
        skip_prk_steps=True,
        set_alpha_to_one=sampler.set_alpha_to_one,
    )


def _shared(diffusion: DiffusionConfig, sampler: SamplerConfig) -> dict[str, Any]:
    """Return what all schedulers take; betas are given, for diffusers' own are float32."""
    return {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "trained_betas": NoiseProcess.of(diffusion).betas.tolist(),
        "timestep_spacing": "leading",
        "steps_offset": sampler.steps_offset,
    }


SAMPLERS: Mapping[Sampler, SamplerRow] = {
    "ddim": SamplerRow(_leading, _ddim),
    "ddpm": SamplerRow(_leading, _ddpm),
    "pndm": SamplerRow(_second_twice, _pndm),
}


def sampling_timesteps(num_train_timesteps: int, sampler: SamplerConfig) -> tuple[int, ...]:
    """Compute the timesteps at which a sampler evaluates the network, noisiest first."""
    return tuple(SAMPLERS[sampler.sampler].timesteps(num_train_timesteps, sampler))


def make_scheduler(diffusion: DiffusionConfig, sampler: SamplerConfig) -> "SchedulerMixin":
    """Build the diffusers scheduler of the settings.

    Raises:
        ScheduleError: The betas are no noise schedule.
    """
    return SAMPLERS[sampler.sampler].scheduler(diffusion, sampler)

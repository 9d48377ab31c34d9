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


def _leading(num_train_timesteps: int, sampler: SamplerConfig) -> list[int]:
    """Space the timesteps as diffusers' ``leading``: evenly, the last at the offset."""
    stride = num_train_timesteps // sampler.num_inference_steps
    steps = reversed(range(sampler.num_inference_steps))
    return [step * stride + sampler.steps_offset for step in steps]


def _second_twice(num_train_timesteps: int, sampler: SamplerConfig) -> list[int]:
    """Visit the second timestep twice: PNDM makes its first step again by what it learns there."""
    steps = _leading(num_train_timesteps, sampler)
    return steps[:2] + steps[1:]


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """One sampler."""

    scheduler: str
    """Name of its class in diffusers."""

    arguments: Callable[[DiffusionConfig, SamplerConfig], dict[str, Any]]
    """Arguments of this class beside those of all samplers' classes."""

    timesteps: Callable[[int, SamplerConfig], list[int]] = _leading
    """From the number of training timesteps: where the network is evaluated, noisiest first."""


SAMPLERS: Mapping[Sampler, SamplerRow] = {
    "ddim": SamplerRow(
        "DDIMScheduler",
        lambda _, sampler: {
            "clip_sample": sampler.clip_sample,
            "set_alpha_to_one": sampler.set_alpha_to_one,
        },
    ),
    "ddpm": SamplerRow(
        "DDPMScheduler",
        lambda diffusion, sampler: {
            "clip_sample": sampler.clip_sample,
            "variance_type": "learned_range" if diffusion.learned_sigma else "fixed_small",
        },
    ),
    "pndm": SamplerRow(
        "PNDMScheduler",
        lambda _, sampler: {"skip_prk_steps": True, "set_alpha_to_one": sampler.set_alpha_to_one},
        _second_twice,
    ),
}


def sampling_timesteps(num_train_timesteps: int, sampler: SamplerConfig) -> tuple[int, ...]:
    """Compute the timesteps at which a sampler evaluates the network, noisiest first."""
    return tuple(SAMPLERS[sampler.sampler].timesteps(num_train_timesteps, sampler))


def make_scheduler(diffusion: DiffusionConfig, sampler: SamplerConfig) -> "SchedulerMixin":
    """Build the diffusers scheduler of the settings.

    Raises:
        ScheduleError: The betas are no noise schedule.
    """
    import diffusers

    row = SAMPLERS[sampler.sampler]
    arguments = {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "trained_betas": NoiseProcess.of(diffusion).betas.tolist(),  # diffusers' own are float32
        "prediction_type": diffusion.prediction_type,
        "timestep_spacing": "leading",
        "steps_offset": sampler.steps_offset,
        **row.arguments(diffusion, sampler),
    }
    return getattr(diffusers, row.scheduler)(**arguments)

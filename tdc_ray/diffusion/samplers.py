"""The samplers: one row for each, with the timesteps it visits and its diffusers scheduler.

A plan reads the timesteps, so frameworks are imported where a scheduler is made, not here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.sampler import Sampler, SamplerConfig
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


KARRAS_RHO = 7.0
"""EDM's, and diffusers'."""


def _leading(process: NoiseProcess, sampler: SamplerConfig) -> list[int]:
    """Space the timesteps as diffusers' ``leading``: evenly, the last at the offset."""
    stride = len(process.betas) // sampler.num_inference_steps
    steps = reversed(range(sampler.num_inference_steps))
    return [step * stride + sampler.steps_offset for step in steps]


def begins_near_the_end(num_train_timesteps: int, num_steps: int, first: int) -> bool:
    """Whether steps begin within one stride of the last timestep, as those do that divide T."""
    return num_train_timesteps - 1 - first <= num_train_timesteps / num_steps


def nearest_steps(num_train_timesteps: int, num_steps: int) -> str:
    """Return the nearest numbers of steps, in words, that divide the timesteps."""
    below, above = range(num_steps, 0, -1), range(num_steps, num_train_timesteps + 1)
    nearest = [next(n for n in side if num_train_timesteps % n == 0) for side in (below, above)]
    return " or ".join(map(str, nearest))


def _second_twice(process: NoiseProcess, sampler: SamplerConfig) -> list[int]:
    """Visit the second timestep twice: PNDM makes its first step again by what it learns there."""
    steps = _leading(process, sampler)
    return steps[:2] + steps[1:]


def _karras(process: NoiseProcess, sampler: SamplerConfig) -> list[int]:
    """Space the timesteps evenly in sigma^(1/7), from the last to 0.

    EDM, arXiv:2206.00364, equation 5. In float32, as in diffusers: timesteps are rounded.

    Raises:
        ConfigError: The first two are the same, where diffusers would leave out the first.
    """
    alphas_cumprod = np.cumprod(1 - process.betas.astype(np.float32), dtype=np.float32)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    low, high = (float(sigma) ** (1 / KARRAS_RHO) for sigma in (sigmas[0], sigmas[-1]))
    visited = np.linspace(high, low, sampler.num_inference_steps) ** KARRAS_RHO
    steps = np.interp(np.log(visited), np.log(sigmas), np.arange(len(sigmas))).round()
    timesteps = [int(step) for step in steps]
    if len(timesteps) > 1 and timesteps[0] == timesteps[1]:
        raise ConfigError(
            f"sampler.num_inference_steps must be less for {sampler.sampler} with these betas, "
            f"got {sampler.num_inference_steps}: it would begin with timestep {timesteps[0]} "
            "twice. Use ddim."
        )
    return timesteps


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """One sampler."""

    scheduler: str
    """Name of its class in diffusers."""

    arguments: Callable[[DiffusionConfig, SamplerConfig], dict[str, Any]]
    """Arguments of this class beside those of all samplers' classes."""

    timesteps: Callable[[NoiseProcess, SamplerConfig], list[int]] = _leading
    """Where the network is evaluated, noisiest first."""


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
    "dpmsolver++": SamplerRow(
        "DPMSolverMultistepScheduler",
        lambda _diffusion, _sampler: {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "use_karras_sigmas": True,
        },
        _karras,
    ),
}


def sampling_timesteps(process: NoiseProcess, sampler: SamplerConfig) -> tuple[int, ...]:
    """Compute the timesteps at which a sampler evaluates the network, noisiest first.

    Raises:
        ConfigError: The sampler cannot take so many steps.
    """
    return tuple(SAMPLERS[sampler.sampler].timesteps(process, sampler))


def checked_timesteps(process: NoiseProcess, sampler: SamplerConfig) -> tuple[int, ...]:
    """Compute the timesteps of a sampler by which images are drawn, noisiest first.

    Raises:
        ConfigError: The sampler cannot take so many steps, begins past the last timestep, or far
            below it, though it begins with noise.
    """
    timesteps = sampling_timesteps(process, sampler)
    total, steps, first = len(process.betas), sampler.num_inference_steps, timesteps[0]
    if first >= total:
        raise ConfigError(
            f"sampler.steps_offset {sampler.steps_offset} moves the first sampling step to "
            f"{first}, past the last timestep {total - 1}. Use 0, or fewer steps."
        )
    if not begins_near_the_end(total, steps, first):
        raise ConfigError(
            f"sampler.num_inference_steps must be {nearest_steps(total, steps)} for "
            f"{sampler.sampler}, got {steps}: of {total} timesteps it would begin at {first}, "
            "with pure noise."
        )
    return timesteps


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

"""The sampling loop over a diffusers scheduler, with one denoiser or one for each timestep."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tdc_ray.schedule import betas
from tdc_ray.seeds import derive_seed
from tdc_ray.settings import DiffusionConfig, SamplerConfig

DenoiserFor = Callable[[int], nn.Module]
"""Gives the denoiser that serves a timestep."""


def make_scheduler(diffusion: DiffusionConfig, sampler: SamplerConfig) -> SchedulerMixin:
    """Build the diffusers scheduler of a config; its betas are computed in float64."""
    values = betas(
        diffusion.beta_schedule,
        diffusion.num_train_timesteps,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
    )
    common = {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "trained_betas": values.tolist(),
        "clip_sample": sampler.clip_sample,
        "timestep_spacing": "leading",
        "steps_offset": sampler.steps_offset,
    }
    if sampler.sampler == "ddim":
        return DDIMScheduler(**common, set_alpha_to_one=sampler.set_alpha_to_one)
    variance = "learned_range" if diffusion.learned_sigma else "fixed_small"
    return DDPMScheduler(**common, variance_type=variance)


def image_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """Random generators of the images ``first`` to ``first + count - 1``.

    Every image has a generator of its own, so its noise does not depend on how images are batched.
    """
    start = derive_seed(seed, "images") + first  # torch's CPU generator heeds 32 bits of a seed
    return [torch.Generator().manual_seed(start + i) for i in range(count)]


@torch.inference_mode()
def sample(
    denoiser_for: DenoiserFor,
    scheduler: SchedulerMixin,
    *,
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
    num_inference_steps: int,
    eta: float = 0.0,
    timestep_scale: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw one image per generator.

    The denoiser is chosen by the discrete timestep, not by the step's index, so that any spacing
    of steps gets the expert that was trained for it.

    Args:
        denoiser_for: Gives the ``UNet2DModel`` that serves a timestep.
        scheduler: Any diffusers scheduler with epsilon prediction and integer timesteps.
        generators: One per image.
        shape: ``(C, H, W)``.
        num_inference_steps: Denoising steps.
        eta: Stochasticity, for schedulers that have it (DDIM).
        timestep_scale: What a timestep is multiplied with before the network sees it.
        device: Where the denoisers are.
        dtype: Their precision.
        on_step: Called after each step.

    Returns:
        ``(B, C, H, W)`` in about [-1, 1], float32, on ``device``.
    """
    num_channels = shape[0]
    generator = list(generators)
    x: Tensor = randn_tensor(
        (len(generator), *shape), generator=generator, device=torch.device(device)
    )
    scheduler.set_timesteps(num_inference_steps)
    x = x * scheduler.init_noise_sigma
    extra = _step_arguments(scheduler, eta=eta, generator=generator)
    learns_variance = str(scheduler.config.get("variance_type", "")).startswith("learned")
    for timestep in scheduler.timesteps.tolist():
        model_input = scheduler.scale_model_input(x, timestep).to(dtype)
        seen = timestep if timestep_scale == 1.0 else timestep * timestep_scale
        timesteps = torch.full((len(x),), seen, device=x.device)
        output = denoiser_for(timestep)(model_input, timesteps).sample.float()
        if not learns_variance:
            output = output[:, :num_channels]  # (B, 2C, H, W) -> (B, C, H, W)
        x = scheduler.step(output, timestep, x, **extra).prev_sample
        on_step()
    return x


def to_uint8(images: Tensor) -> Tensor:
    """Bring images from [-1, 1], ``(B, C, H, W)``, to pixels: uint8, ``(B, H, W, C)``."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu()


def _step_arguments(
    scheduler: SchedulerMixin, *, eta: float, generator: list[torch.Generator]
) -> dict[str, Any]:
    """What this scheduler's step takes of: eta, clipped outputs (as improved-diffusion), noise."""
    wanted = {"eta": eta, "use_clipped_model_output": True, "generator": generator}
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in wanted.items() if name in accepted}

"""The sampling loop over a diffusers scheduler, with one denoiser or one for each timestep."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from tdc_ray.errors import ConfigError
from tdc_ray.models.forward import predict
from tdc_ray.models.winograd import WinogradConvolutions
from tdc_ray.seeds import derive_seed

DenoiserFor = Callable[[int], nn.Module]
"""Gives the denoiser that serves a timestep."""


def image_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """Random generators of the images ``first`` to ``first + count - 1``.

    Every image has a generator of its own, so its noise does not depend on how images are batched.
    """
    start = derive_seed(seed, "images") + first  # torch's CPU generator heeds 32 bits of a seed
    return [torch.Generator().manual_seed(start + i) for i in range(count)]


def image_labels(num_classes: int | None, first: int, count: int) -> Tensor | None:
    """Classes of the images ``first`` to ``first + count - 1``: image i is of i mod num_classes.

    So an image is of the same class in every batch, model and run, and all classes come equally
    often.

    Returns:
        ``(count,)``, int64; None where there are no classes.
    """
    return None if num_classes is None else torch.arange(first, first + count) % num_classes


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
    class_labels: Tensor | None = None,
    guidance_scale: float = 1.0,
    null_class: int | None = None,
    winograd: bool = False,
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
        class_labels: ``(B,)`` for denoisers that are conditioned on classes.
        guidance_scale: Weight s of classifier-free guidance (arXiv:2207.12598), in the form
            unconditional + s (conditional - unconditional); 1: none.
        null_class: The class that stands for none; guidance needs it.
        winograd: On CPUs, in float32: 3 x 3 convolutions by Winograd's algorithm.

    Returns:
        ``(B, C, H, W)`` in about [-1, 1], float32, on ``device``.

    Raises:
        ConfigError: In fp16 numbers left its range.
    """
    num_channels = shape[0]
    x: Tensor = randn_tensor(
        (len(generators), *shape), generator=list(generators), device=torch.device(device)
    )
    scheduler.set_timesteps(num_inference_steps)
    x = x * scheduler.init_noise_sigma
    extra = _step_arguments(scheduler, eta=eta, generators=generators)
    reads_variance = _reads_variance(scheduler)
    winograd = winograd and x.device.type == "cpu" and dtype == torch.float32
    channels_last = winograd or x.device.type == "cuda"
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    told, copies = None, 1
    if class_labels is not None:
        labels = class_labels.to(x.device)
        if guidance_scale != 1.0:
            assert null_class is not None
            labels, copies = torch.cat([labels, torch.full_like(labels, null_class)]), 2
        told = labels
    for timestep in scheduler.timesteps.tolist():
        model_input = scheduler.scale_model_input(x, timestep).to(dtype)
        seen = timestep if timestep_scale == 1.0 else timestep * timestep_scale
        timesteps = torch.full((copies * len(x),), seen, device=x.device)
        model_input = torch.cat([model_input] * copies)  # guided: (B, ...) -> (2B, ...)
        if channels_last:
            model_input = model_input.to(memory_format=torch.channels_last)
        read = None if reads_variance else num_channels  # of (B, 2C, H, W), where it is learned
        denoiser = denoiser_for(timestep)
        with WinogradConvolutions() if winograd else contextlib.nullcontext():
            output = predict(denoiser, model_input, timesteps, told, num_channels=read)
        if dtype == torch.float16:
            finite &= output.isfinite().all()
        if copies == 2:
            output = _guided(output, guidance_scale, num_channels)  # (2B, ...) -> (B, ...)
        x = scheduler.step(output, timestep, x, **extra).prev_sample
        on_step()
    if not finite:  # clipped samples would not show it
        raise ConfigError(
            "precision must be fp32 or bf16 for this model, got fp16: numbers left its range."
        )
    return x


def to_uint8(images: Tensor) -> Tensor:
    """Bring images from [-1, 1], ``(B, C, H, W)``, to pixels: uint8, ``(B, H, W, C)``."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu()


def _guided(output: Tensor, scale: float, num_channels: int) -> Tensor:
    """Guide epsilon, given the outputs with classes and then those without.

    The channels of a learned variance, if there are any, are those with classes.
    """
    conditional, unconditional = output.chunk(2)  # (2B, C or 2C, H, W) -> twice (B, ...)
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([guided[:, :num_channels], conditional[:, num_channels:]], dim=1)


def _reads_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler reads a learned variance.

    Others may have the setting all the same: they keep what the config that they were made from
    said, and never read it.
    """
    has_setting = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return has_setting and str(scheduler.config["variance_type"]).startswith("learned")


def _step_arguments(
    scheduler: SchedulerMixin, *, eta: float, generators: Sequence[torch.Generator]
) -> dict[str, Any]:
    """Return what the scheduler's step accepts of eta, clipped outputs and the noise's generators.

    Its signature says so, not the sampler's row: a pipeline's scheduler may be any of diffusers'.
    Epsilon is derived anew from the clipped image as in improved-diffusion.
    """
    wanted = {"eta": eta, "use_clipped_model_output": True, "generator": list(generators)}
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in wanted.items() if name in accepted}

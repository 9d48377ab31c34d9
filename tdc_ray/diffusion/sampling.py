"""The sampling loop over a diffusers scheduler, with one denoiser or one for each timestep."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tdc_ray.diffusion.samplers import reads_variance, set_timesteps
from tdc_ray.errors import ConfigError
from tdc_ray.models.compiled import CompiledDenoiser
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.forward import predict
from tdc_ray.models.labels import Captions, Labels, join_captions, map_captions
from tdc_ray.models.winograd import WinogradConvolutions
from tdc_ray.seeds import derive_seed

DenoiserFor = Callable[[float], Denoiser | CompiledDenoiser]
"""Returns the denoiser that serves a timestep, which may lie between two of training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """How images are sampled, whatever the noise that they start from."""

    shape: tuple[int, int, int]
    """``(C, H, W)`` of an image, or of its latents."""

    num_inference_steps: int
    """Denoising steps."""

    eta: float = 0.0
    """Stochasticity, in [0, 1], for schedulers that have it (DDIM)."""

    use_clipped_model_output: bool = False
    """Derive epsilon anew from the clipped image, as improved-diffusion does, for schedulers that
    can (DDIM)."""

    timestep_scale: float = 1.0
    """What a timestep is multiplied with before the network sees it."""

    guidance_scale: float = 1.0
    """Weight s of classifier-free guidance (arXiv:2207.12598), in the form unconditional +
    s (conditional - unconditional); 1 means none."""

    null_class: int | None = None
    """The class that stands for none; guidance needs it."""

    device: torch.device | str = "cpu"
    """Where the denoisers are."""

    dtype: torch.dtype = torch.float32
    """The denoisers' precision."""

    winograd: bool = False
    """On CPUs, in float32: 3 x 3 convolutions by Winograd's algorithm."""


def image_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """Create the random generators of the images ``first`` to ``first + count - 1``.

    Every image has a generator of its own, so its noise does not depend on how images are batched.
    """
    start = derive_seed(seed, "images") + first  # torch's CPU generator uses 32 bits of a seed
    return [torch.Generator().manual_seed(start + i) for i in range(count)]


def image_labels(num_classes: int | None, first: int, count: int) -> Tensor | None:
    """Return the classes of the images ``first`` to ``first + count - 1``: i mod num_classes.

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
    spec: SamplingSpec,
    generators: Sequence[torch.Generator],
    *,
    class_labels: Tensor | None = None,
    prompts: Captions | None = None,
    negative_prompts: Captions | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample one image per generator.

    The denoiser is chosen by the timestep, not by the step's index, so that any spacing of steps
    gets the expert that was trained for it. Scheduler and network get the timestep as from
    diffusers' own pipelines: with its fraction, where the scheduler has them.

    Args:
        denoiser_for: Returns the ``UNet2DModel`` that serves a timestep.
        scheduler: Any diffusers scheduler of the network's prediction type and noise process.
        spec: Shape, steps, guidance, precision.
        generators: One per image.
        class_labels: ``(B,)`` for denoisers that are conditioned on classes.
        prompts: What those conditioned on text read of the images' prompts.
        negative_prompts: The same of what guidance leads away from.
        on_step: Called after each step.

    Returns:
        ``(B, C, H, W)`` in about [-1, 1], float32, on the spec's device.

    Raises:
        ConfigError: In fp16 numbers left its range, or the scheduler cannot take so many steps.
    """
    device, channels = torch.device(spec.device), spec.shape[0]
    shape = (len(generators), *spec.shape)
    x: Tensor = randn_tensor(shape, generator=list(generators), device=device)
    set_timesteps(scheduler, spec.num_inference_steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # those of flow matching have none
    scaled_input = getattr(scheduler, "scale_model_input", lambda x, _: x)
    extra = _step_arguments(scheduler, spec, generators)
    num_channels = None if _reads_variance(scheduler) else channels  # of (B, 2C, H, W)
    winograd = spec.winograd and device.type == "cpu" and spec.dtype == torch.float32
    channels_last = winograd or device.type == "cuda"
    labels = _labels(spec, class_labels, prompts, negative_prompts)
    guided = labels is not None and spec.guidance_scale != 1.0
    finite = torch.ones((), dtype=torch.bool, device=device)  # read once: steps need not wait
    for step in scheduler.timesteps:
        timestep = step.item()
        x_t = scaled_input(x, step).to(spec.dtype)
        x_t = torch.cat([x_t, x_t]) if guided else x_t  # (B, ...) -> (2B, ...)
        if channels_last:
            x_t = x_t.to(memory_format=torch.channels_last)
        scaled = timestep if spec.timestep_scale == 1.0 else timestep * spec.timestep_scale
        timesteps = torch.full((len(x_t),), scaled, device=device)
        denoiser = denoiser_for(timestep)
        with WinogradConvolutions() if winograd else contextlib.nullcontext():
            output = predict(denoiser, x_t, timesteps, labels, num_channels=num_channels)
        if spec.dtype == torch.float16:
            finite &= output.isfinite().all()
        if guided:
            output = _guide(output, spec.guidance_scale, channels)  # (2B, ...) -> (B, ...)
        x = scheduler.step(output, step, x, **extra).prev_sample
        on_step()
    if not finite:  # clipped samples would not show it
        raise ConfigError(
            "precision must be fp32 or bf16 for this model, got fp16: numbers left its range."
        )
    return x


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1], ``(B, C, H, W)``, to pixels: uint8, ``(B, H, W, C)``, on CPU."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu()


def _labels(
    spec: SamplingSpec,
    classes: Tensor | None,
    prompts: Captions | None,
    negative_prompts: Captions | None,
) -> Labels:
    """Return the labels of B images; with guidance as :func:`_guide` expects them."""
    guided = spec.guidance_scale != 1.0
    if prompts is not None:
        if guided:
            assert negative_prompts is not None
            prompts = join_captions([prompts, negative_prompts])  # -> (2B, ...)
        return map_captions(lambda tensor: tensor.to(spec.device, spec.dtype), prompts)
    if classes is None:
        return None
    if guided:
        assert spec.null_class is not None
        classes = torch.cat([classes, torch.full_like(classes, spec.null_class)])  # -> (2B,)
    return classes.to(spec.device)


def _guide(output: Tensor, scale: float, num_channels: int) -> Tensor:
    """Compute the guided prediction from outputs with classes, then without: ``(2B, ...)``.

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
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    return learned and reads_variance(type(scheduler))


def _step_arguments(
    scheduler: SchedulerMixin, spec: SamplingSpec, generators: Sequence[torch.Generator]
) -> dict[str, Any]:
    """Return what the scheduler's step accepts of eta, clipped outputs and the noise's generators.

    Its signature says so, not the sampler's row: a pipeline's scheduler may be any of diffusers'.
    """
    wanted = {
        "eta": spec.eta,
        "use_clipped_model_output": spec.use_clipped_model_output,
        "generator": list(generators),
    }
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in wanted.items() if name in accepted}

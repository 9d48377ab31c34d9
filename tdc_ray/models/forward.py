"""A denoiser's forward pass for sampling: in chunks, read channels alone, last layers in fp32."""

import contextlib
import operator
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tdc_ray.models.compiled import CompiledDenoiser
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import FAMILIES, family_of
from tdc_ray.models.labels import Labels, conditions, map_labels
from tdc_ray.models.network_config import image_size

BYTES_ON_CPU = 2**24
"""Largest output of the first convolution, in bytes. Larger tensors leave the caches and are
returned to the system after every layer: with 128 images at once, 64 MiB, iddpm-cifar10 took 1.5
times as long for each as with 32."""

SHARE_OF_GPU = 1 / 64
"""The same as a share of a GPU's memory: skips and a layer's workspace take many times that."""

GRADIENTS = 16
"""By how much gradients reduce the images that go through a GPU at once: for each one 60 to 200
times the first convolution's output is kept, in all up to a fifth of the GPU's memory."""

MOST_AT_ONCE = 1024
"""Most images, however small they are."""


def max_batch_size(
    network: Denoiser, size: tuple[int, int] | None = None, *, gradients: bool = False
) -> int:
    """Return how many images a forward pass should take at most on a network's device.

    Args:
        network: The network.
        size: Height and width of what it denoises; None means those of its config.
        gradients: Whether a backward pass follows.
    """
    weight = family_of(network).ends(network).first.weight
    height, width = size or image_size(network.config)
    bytes_each = len(weight) * height * width * weight.element_size()
    most = BYTES_ON_CPU
    if weight.device.type == "cuda":
        most = int(SHARE_OF_GPU * torch.cuda.get_device_properties(weight.device).total_memory)
        most //= GRADIENTS if gradients else 1
    return min(max(1, most // bytes_each), MOST_AT_ONCE)


def predict(
    denoiser: Denoiser | CompiledDenoiser,
    x_t: Tensor,
    timesteps: Tensor,
    labels: Labels = None,
    *,
    num_channels: int | None = None,
) -> Tensor:
    """Run a denoiser on as many images at a time as its device takes best.

    The last norm and convolution compute in float32, whatever the others do: they take next to no
    time, and in bf16 the output of iddpm-cifar10 with random weights was nearer to float32's by a
    twentieth. Their weights are swapped meanwhile, so two threads must not share a denoiser.

    Args:
        denoiser: Of a class of ``families``; any other module gets all images at once.
        x_t: Noised images, ``(B, C, H, W)``.
        timesteps: As the network sees them, ``(B,)``.
        labels: For denoisers that are conditioned on classes or captions.
        num_channels: Channels of the output that are read; None means all.

    Returns:
        ``(B, num_channels, H, W)``, float32.
    """
    network = denoiser.network if isinstance(denoiser, CompiledDenoiser) else denoiser

    def output_of(images: slice) -> Tensor:
        part = operator.itemgetter(images)
        taken = map_labels(part, labels)
        if isinstance(denoiser, CompiledDenoiser):
            output = denoiser(part(x_t), part(timesteps), taken)
        else:
            output = denoiser(part(x_t), timestep=part(timesteps), **conditions(taken)).sample
        return output[:, :num_channels].float()

    if type(network).__name__ not in FAMILIES:
        return output_of(slice(None))
    size = max_batch_size(network, (x_t.shape[-2], x_t.shape[-1]))
    with output_layers_in_fp32(network, num_channels):
        starts = range(0, len(x_t), size)
        return torch.cat([output_of(slice(first, first + size)) for first in starts])


@contextlib.contextmanager
def output_layers_in_fp32(network: Denoiser, num_channels: int | None) -> Iterator[None]:
    """Compute a network's last layers in float32, and only some channels, within the context.

    Args:
        network: The network.
        num_channels: The channels, if a convolution outputs them; None means all.
    """
    ends = family_of(network).ends(network)
    norm, last = ends.last_norm, ends.last
    assert norm is not None
    assert last.bias is not None
    few = num_channels if isinstance(last, nn.Conv2d) else None
    weight, bias = last.weight.data[:few].float(), last.bias.data[:few].float()
    with contextlib.ExitStack() as stack:
        to_float = norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        stack.callback(to_float.remove)
        if norm.weight is not None:  # a transformer's has none
            affine = norm.weight.data.float(), norm.bias.data.float()
            stack.enter_context(swapped_weights(norm, *affine))
        stack.enter_context(swapped_weights(last, weight, bias))
        yield


@contextlib.contextmanager
def swapped_weights(
    layer: nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm,
    weight: Tensor,
    bias: Tensor | None,
) -> Iterator[None]:
    """Replace the weights of a layer, and its bias if it has one, within the context."""
    values = [(layer.weight, weight)]
    if layer.bias is not None:
        assert bias is not None
        values.append((layer.bias, bias))
    before = [parameter.data for parameter, _ in values]
    for parameter, value in values:
        parameter.data = value
    try:
        yield
    finally:
        for (parameter, _), value in zip(values, before, strict=True):
            parameter.data = value

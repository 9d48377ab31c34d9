"""Cuts units out of a UNet: which tensors go with a unit's channels, and what stays of them.

Both are read from ``layers``, which planning needs without torch; a test holds it equal to what
Torch-Pruning's dependency graph finds, in a fraction of the time that tracing a graph takes.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.layer import Channels, Layer, total
from tdc_ray.models.unet2d.layers import all_layers
from tdc_ray.models.unet2d.shapes import channel_offsets
from tdc_ray.models.units import KeptIndices, Unit


@dataclass(frozen=True, slots=True)
class CoupledParameter:
    """A parameter that has a unit's channels along one of its dimensions."""

    layer: str
    """Dotted name of the module."""

    module: nn.Module
    name: str
    dim: int
    offsets: tuple[int, ...]
    """Where the channels begin along the dimension. They may be there more than once: as scale and
    shift of a time embedding, or where a stream is its own skip connection."""

    num_channels: int

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        parameter = getattr(self.module, self.name)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def by_channel(self, values: Tensor) -> Tensor:
        """Reshape a tensor shaped like the parameter to ``(channels, everything else)``."""
        copies = [values.narrow(self.dim, offset, self.num_channels) for offset in self.offsets]
        rows = [part.movedim(self.dim, 0).reshape(self.num_channels, -1) for part in copies]
        return torch.cat(rows, dim=1)


def coupled_parameters(unet: UNet2DModel, unit: Unit) -> list[CoupledParameter]:
    """List the parameters that go with a unit's channels.

    Args:
        unet: An uncut UNet; for an inner unit, others may have been cut.
        unit: One of its units.

    Raises:
        UnsupportedModelError: The UNet has no such unit.
    """
    count = unit.width * unit.channels
    coupled = [
        CoupledParameter(layer.name, unet.get_submodule(layer.name), name, dim, offsets, count)
        for layer in all_layers(unet.config)
        for name, dim, channels in (
            ("weight", 0, layer.outputs),
            ("bias", 0, layer.outputs),
            ("weight", 1, layer.inputs),
        )
        if (offsets := tuple(channel_offsets(unit.name, channels)))
    ]
    if not coupled:
        raise UnsupportedModelError(f"this UNet has no {unit.kind} unit {unit.name}.")
    return coupled


def cut(unet: UNet2DModel, units: Sequence[Unit], kept: KeptIndices) -> UNet2DModel:
    """Return a copy of a UNet without the steps (groups, heads, slices) that are not kept.

    Args:
        unet: An uncut UNet, which stays as it is. It may lie on the meta device.
        units: Its units.
        kept: What stays of each of them; at least one step.
    """
    pruned = copy.deepcopy(unet)
    for layer, outputs, inputs in _kept_channels(unet, units, kept):
        module = pruned.get_submodule(layer.name)
        for name, dim, channels in (
            ("weight", 0, outputs),
            ("bias", 0, outputs),
            ("weight", 1, inputs),
        ):
            if channels is not None:
                old = getattr(module, name)
                new = old.detach().index_select(dim, channels.to(old.device)).contiguous()
                setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    for unit in units:
        if unit.kind == "residual":
            pruned.get_submodule(unit.name).norm2.num_groups = len(kept[unit.name])
        elif unit.kind == "attention":
            attention = pruned.get_submodule(unit.name)
            attention.heads = attention.sliceable_head_dim = len(kept[unit.name])
    for module in pruned.modules():
        _update_attributes(module)
    return pruned


def kept_outputs(unet: UNet2DModel, units: Sequence[Unit], kept: KeptIndices) -> dict[str, Tensor]:
    """Return which output channels stay of every convolution and linear layer that loses some.

    Args:
        unet: An uncut UNet.
        units: Its units.
        kept: What stays of each of them.

    Returns:
        Indices of the base's output channels, in order, by the layer's dotted name.
    """
    return {
        layer.name: outputs
        for layer, outputs, _ in _kept_channels(unet, units, kept)
        if outputs is not None and layer.pixels
    }


def _kept_channels(
    unet: UNet2DModel, units: Sequence[Unit], kept: KeptIndices
) -> Iterator[tuple[Layer, Tensor | None, Tensor | None]]:
    """Yield every layer with the indices of the outputs and of the inputs that stay; None: all."""
    channels_of = {unit.name: unit.channel_indices(kept[unit.name]) for unit in units}

    def indices(channels: tuple[Channels, ...]) -> Tensor | None:
        offsets = itertools.accumulate((run.count for run in channels), initial=0)
        stay = [
            offset + channel
            for offset, run in zip(offsets, channels, strict=False)
            for channel in channels_of.get(run.unit or "", range(run.count))
        ]
        return torch.tensor(stay) if len(stay) < total(channels) else None

    for layer in all_layers(unet.config):
        yield layer, indices(layer.outputs), indices(layer.inputs)


def _update_attributes(module: nn.Module) -> None:
    """Set what a module says of its widths to those of its weights: forward passes read it."""
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, ResnetBlock2D):
        module.in_channels = len(module.norm1.weight)
        module.out_channels = len(module.conv2.weight)
        for sampler in (module.upsample, module.downsample):
            if sampler is not None:  # without weights; its forward pass checks its input
                sampler.channels = sampler.out_channels = module.in_channels
    elif isinstance(module, Downsample2D | Upsample2D):
        if isinstance(module.conv, nn.Conv2d):
            module.out_channels, module.channels = module.conv.weight.shape[:2]
    elif isinstance(module, Attention):
        module.inner_dim, module.query_dim = module.to_q.weight.shape
        module.inner_kv_dim, module.cross_attention_dim = module.inner_dim, module.query_dim
        module.out_dim = len(module.to_out[0].weight)

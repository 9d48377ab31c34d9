"""Prunes units of a UNet: which tensors have a unit's channels, and which of them are kept."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.unet2d.layers import all_layers
from tdc_ray.models.unet2d.shapes import channel_offsets
from tdc_ray.models.unet2d.streams import cut_streams
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
    """Offsets of the channels along the dimension. They may be there more than once: as scale and
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

    def keep(self, channels: Tensor) -> None:
        """Remove all but the given channels; the dimension must have no others."""
        old = self.parameter
        kept = old.detach().index_select(self.dim, self.indices(channels).to(old.device))
        new = nn.Parameter(kept.contiguous(), requires_grad=old.requires_grad)
        setattr(self.module, self.name, new)

    def indices(self, channels: Tensor) -> Tensor:
        """Return the indices of some of the unit's channels along the dimension."""
        return torch.cat([offset + channels for offset in self.offsets])


def coupled_parameters(unet: UNet2DModel, unit: Unit) -> list[CoupledParameter]:
    """Return the parameters that have a unit's channels.

    Args:
        unet: An unpruned UNet; for an inner unit, others may have been pruned.
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

    diffusers' ``save_pretrained``, which would write a config without its widths, refuses it.

    Args:
        unet: An unpruned UNet, which is not changed. It may be on the meta device.
        units: Its units.
        kept: What stays of each of them; at least one step.
    """
    pruned = copy.deepcopy(unet)
    narrower = [unit for unit in units if len(kept[unit.name]) < unit.width]
    cut_streams(pruned, [unit for unit in narrower if unit.kind == "stream"], kept)
    for unit in narrower:
        if unit.kind != "stream":
            _cut_inner(pruned, unit, kept[unit.name])
    for module in pruned.modules():
        _update_attributes(module)
    if narrower:
        pruned.save_pretrained = _refuse_to_save
    return pruned


def _refuse_to_save(*_: object, **__: object) -> NoReturn:
    raise UnsupportedModelError(
        "diffusers' save_pretrained keeps no widths: a pruned UNet could not be loaded again. "
        "Save it by tdc_ray.models.saved_expert.save_expert, or a whole run by tdc-ray export."
    )


def kept_outputs(unet: UNet2DModel, units: Sequence[Unit], kept: KeptIndices) -> dict[str, Tensor]:
    """Return which output channels stay of every convolution and linear layer that loses some.

    Args:
        unet: An unpruned UNet.
        units: Its units.
        kept: What stays of each of them.

    Returns:
        Indices of the base's output channels, in order, by the layer's dotted name.
    """
    outputs = {}
    for unit in units:
        if len(kept[unit.name]) < unit.width:
            channels = torch.tensor(unit.channel_indices(kept[unit.name]))
            for coupled in coupled_parameters(unet, unit):
                if coupled.dim == 0 and isinstance(coupled.module, nn.Conv2d | nn.Linear):
                    outputs[coupled.layer] = coupled.indices(channels)
    return outputs


def _cut_inner(unet: UNet2DModel, unit: Unit, kept: tuple[int, ...]) -> None:
    channels = torch.tensor(unit.channel_indices(kept))
    for coupled in coupled_parameters(unet, unit):
        coupled.keep(channels)
    block = unet.get_submodule(unit.name)
    if isinstance(block, ResnetBlock2D):
        block.norm2.num_groups = len(kept)
    elif isinstance(block, Attention):
        block.heads = block.sliceable_head_dim = len(kept)


def _update_attributes(module: nn.Module) -> None:
    """Set a module's width attributes to the widths of its weights: forward passes read them."""
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

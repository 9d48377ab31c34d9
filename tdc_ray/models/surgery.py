"""Cuts units out of a UNet: which tensors go with a unit's channels, and what is left of them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.units import Kept, Unit


@dataclass(frozen=True, slots=True)
class Coupled:
    """A parameter that has the unit's inner channels along one of its dimensions."""

    module: nn.Module
    name: str
    dim: int
    copies: int = 1
    """How often the channels follow each other along the dimension (scale, then shift: 2)."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        parameter = getattr(self.module, self.name)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def by_channel(self, values: Tensor) -> Tensor:
        """Bring a tensor shaped like the parameter to ``(channels, everything else)``."""
        front = values.movedim(self.dim, 0)
        channels = front.shape[0] // self.copies
        return front.reshape(self.copies, channels, -1).transpose(0, 1).flatten(1)

    def keep(self, channels: Tensor, num_channels: int) -> None:
        """Leave nothing but the given channels of ``num_channels``."""
        index = torch.cat([channels + copy * num_channels for copy in range(self.copies)])
        old = self.parameter
        kept = old.detach().index_select(self.dim, index.to(old.device)).contiguous()
        setattr(self.module, self.name, nn.Parameter(kept, requires_grad=old.requires_grad))


def coupled(unet: UNet2DModel, unit: Unit) -> list[Coupled]:
    """List the parameters that go with a unit's inner channels.

    Raises:
        UnsupportedModelError: The block is not of the kind that the unit was made for.
    """
    block = unet.get_submodule(unit.name)
    if unit.kind == "residual" and isinstance(block, ResnetBlock2D):
        copies = 2 if block.time_embedding_norm == "scale_shift" else 1
        return [
            Coupled(block.conv1, "weight", 0),
            Coupled(block.conv1, "bias", 0),
            Coupled(block.time_emb_proj, "weight", 0, copies),
            Coupled(block.time_emb_proj, "bias", 0, copies),
            Coupled(block.norm2, "weight", 0),
            Coupled(block.norm2, "bias", 0),
            Coupled(block.conv2, "weight", 1),
        ]
    if unit.kind == "attention" and isinstance(block, Attention):
        into = (block.to_q, block.to_k, block.to_v)
        rows = [Coupled(layer, name, 0) for layer in into for name in ("weight", "bias")]
        return [*rows, Coupled(block.to_out[0], "weight", 1)]
    raise UnsupportedModelError(
        f"{unit.name} is a {type(block).__name__}, which cannot be cut as {unit.kind}."
    )


def cut(unet: UNet2DModel, units: Sequence[Unit], kept: Kept) -> UNet2DModel:
    """Give a copy of a UNet without the groups and heads that are not kept.

    Args:
        unet: An uncut UNet; it is left as it is. It may lie on the meta device.
        units: Its units.
        kept: What stays of each of them; at least one group or head.
    """
    pruned = copy.deepcopy(unet)
    for unit in units:
        if len(kept[unit.name]) < unit.width:
            _cut_unit(pruned, unit, kept[unit.name])
    return pruned


def _cut_unit(unet: UNet2DModel, unit: Unit, kept: tuple[int, ...]) -> None:
    places = torch.tensor(kept)[:, None] * unit.channels + torch.arange(unit.channels)
    channels = places.flatten()  # (groups kept, channels of one) -> (channels kept,)
    for part in coupled(unet, unit):
        part.keep(channels, unit.width * unit.channels)
    block, width = unet.get_submodule(unit.name), len(channels)
    if isinstance(block, ResnetBlock2D):
        block.conv1.out_channels = width
        block.time_emb_proj.out_features = len(block.time_emb_proj.weight)
        block.norm2.num_channels, block.norm2.num_groups = width, len(kept)
        block.conv2.in_channels = width
    elif isinstance(block, Attention):
        for layer in (block.to_q, block.to_k, block.to_v):
            layer.out_features = width
        block.to_out[0].in_features = width
        block.heads = block.sliceable_head_dim = len(kept)
        block.inner_dim = block.inner_kv_dim = width

"""The units of a UNet: what can be cut without touching anything but the unit itself.

A unit is the inner width of a residual block, in whole GroupNorm groups, or an attention's heads.
Cutting it leaves the residual stream, the skip connections and the statistics of the groups that
are kept as they were, so macs and parameters add up over the units.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tdc_ray.models.architectures import UNetConfig
from tdc_ray.models.layers import AttentionBlock, Layer, Part, ResidualBlock, layers, parts

Kept = Mapping[str, tuple[int, ...]]
"""For every unit, which of its groups or heads stay, in rising order."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A residual block's inner width or an attention's heads."""

    name: str
    """Dotted name of the block in the ``UNet2DModel``."""

    kind: Literal["residual", "attention"]

    width: int
    """How many GroupNorm groups, or heads, there are."""

    channels: int
    """Channels of one group or head."""

    macs: int
    """Macs that go with one group or head."""

    num_params: int
    """Parameters that go with one group or head."""

    pixels: int
    """Height times width of what the block gives out."""


def units_of(config: UNetConfig) -> tuple[Unit, ...]:
    """List the units of a UNet in the order of its forward pass.

    Raises:
        UnsupportedModelError: The UNet has a block of an unknown kind.
    """
    return tuple(_unit(part) for part in parts(config) if not isinstance(part, Layer))


def keep_all(units: tuple[Unit, ...]) -> dict[str, tuple[int, ...]]:
    """Give the choice that cuts nothing."""
    return {unit.name: tuple(range(unit.width)) for unit in units}


def _unit(part: Part) -> Unit:
    if isinstance(part, AttentionBlock):
        width = part.num_heads
        channels = part.channels // width
        own = [layer for layer in layers(part) if layer.macs]  # the norm is not the heads'
        # to_q, to_k, to_v have a bias per inner channel; to_out's bias is the stream's.
        shared = part.channels
        kind: Literal["residual", "attention"] = "attention"
    else:
        assert isinstance(part, ResidualBlock)
        width = part.num_groups
        channels = part.out_channels // width
        inner = ("conv1", "time_emb_proj", "norm2", "conv2")
        own = [layer for layer in layers(part) if layer.name.rsplit(".", 1)[-1] in inner]
        shared = part.out_channels  # conv2's bias is the stream's
        kind = "residual"
    macs = sum(layer.macs for layer in own)
    num_params = sum(layer.num_params for layer in own) - shared
    return Unit(part.name, kind, width, channels, macs // width, num_params // width, part.pixels)

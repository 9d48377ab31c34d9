"""What can be pruned of a UNet2DModel: inner widths, heads, and streams."""

from collections import defaultdict
from math import lcm
from typing import Literal

from tdc_ray.models.layer import Layer
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.layers import blocks
from tdc_ray.models.unet2d.shapes import AttentionBlock, ResidualBlock
from tdc_ray.models.units import SpaceKind, Unit


def units_of(config: NetworkConfig, kind: SpaceKind = "inner") -> tuple[Unit, ...]:
    """Return the units of a UNet in the order of its forward pass.

    Streams that have one channel in each GroupNorm group cannot be pruned and are left out.

    Raises:
        UnsupportedModelError: The UNet has a block of an unknown kind.
    """
    all_blocks = blocks(config)
    groups: defaultdict[str | None, int] = defaultdict(lambda: 1)
    for block in all_blocks:
        if not isinstance(block, Layer):
            for stream in block.streams:
                groups[stream.unit] = lcm(groups[stream.unit], block.num_groups or 1)
    units: dict[str, Unit] = {}
    for block in all_blocks:
        if not isinstance(block, Layer):
            units[block.name] = inner_unit(block)
        stream = block.outputs[0] if isinstance(block, Layer) else block.stream
        step = groups[stream.unit]
        if kind == "full" and stream.unit is not None and stream.count > step:
            unit = Unit(stream.unit, "stream", stream.count // step, step, block.pixels)
            units.setdefault(stream.unit, unit)
    return tuple(units.values())


def inner_unit(block: ResidualBlock | AttentionBlock) -> Unit:
    """Return the inner width of a block, or its heads."""
    kind: Literal["residual", "attention"]
    if isinstance(block, AttentionBlock):
        kind, width = "attention", block.num_heads
    else:
        kind, width = "residual", block.num_groups
    return Unit(block.name, kind, width, block.inner.count // width, block.pixels)

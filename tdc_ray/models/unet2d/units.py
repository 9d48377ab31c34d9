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
    """List the units of a UNet in the order of its forward pass.

    Streams that have but one channel in each GroupNorm group cannot be cut and are left out.

    Raises:
        UnsupportedModelError: The UNet has a block of an unknown kind.
    """
    found = blocks(config)
    groups: defaultdict[str | None, int] = defaultdict(lambda: 1)
    for part in found:
        if not isinstance(part, Layer):
            for stream in part.streams:
                groups[stream.unit] = lcm(groups[stream.unit], part.num_groups or 1)
    units: dict[str, Unit] = {}
    for part in found:
        if not isinstance(part, Layer):
            units[part.name] = _inner_unit(part)
        stream = part.outputs[0] if isinstance(part, Layer) else part.stream
        step = groups[stream.unit]
        if kind == "full" and stream.unit is not None and stream.count > step:
            unit = Unit(stream.unit, "stream", stream.count // step, step, part.pixels)
            units.setdefault(stream.unit, unit)
    return tuple(units.values())


def _inner_unit(part: ResidualBlock | AttentionBlock) -> Unit:
    kind: Literal["residual", "attention"]
    if isinstance(part, AttentionBlock):
        kind, width = "attention", part.num_heads
    else:
        kind, width = "residual", part.num_groups
    return Unit(part.name, kind, width, part.inner.count // width, part.pixels)

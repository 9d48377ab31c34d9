"""The units of a UNet: what can be cut as a whole.

Inner units are the inner width of a residual block, in whole GroupNorm groups, and an attention's
heads. Cutting them leaves the residual stream, the skip connections and the statistics of the
groups that are kept as they were, so macs and parameters add up over them.

Stream units are the width of the residual stream itself, from where a convolution starts it to
where the next one does; whatever adds to it or reads it, skip connections too, is cut with it. A
step takes one channel from each of its GroupNorm groups, so that norms of the stream keep their
groups; a norm that reads a skip beside it has other groups once its parts are narrower.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Literal

from tdc_ray.models.layer import STREAM, AttentionBlock, Layer, ResidualBlock
from tdc_ray.models.unet2d.architectures import UNetConfig
from tdc_ray.models.unet2d.layers import parts

Kept = Mapping[str, tuple[int, ...]]
"""For every unit, which of its steps (groups, heads, slices of the stream) stay, in rising
order."""

SpaceKind = Literal["inner", "full"]
"""Inner units alone, or the stream's too."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A residual block's inner width, an attention's heads or the width of the stream."""

    name: str
    """Dotted name of the block in the ``UNet2DModel``; for a stream, of the module that starts it,
    after ``stream:``."""

    kind: Literal["residual", "attention", "stream"]

    width: int
    """How many steps there are: GroupNorm groups, heads, or slices of the stream."""

    channels: int
    """Channels of one step."""

    pixels: int
    """Height times width of what the block gives out."""

    multiple: int = 1
    """What the number of channels that are kept should be a multiple of."""

    @property
    def legal_widths(self) -> tuple[int, ...]:
        """Widths that it may keep, rising: those whose channels are a multiple, and its own."""
        narrower = range(1, self.width)
        return (*(w for w in narrower if w * self.channels % self.multiple == 0), self.width)

    def places(self, steps: Iterable[int]) -> list[int]:
        """Tell which of the unit's channels belong to some steps: rising where these rise."""
        if self.kind == "stream":  # one channel of each group
            kept = tuple(steps)
            return [group * self.width + step for group in range(self.channels) for step in kept]
        return [step * self.channels + i for step in steps for i in range(self.channels)]


def units_of(config: UNetConfig, kind: SpaceKind = "inner") -> tuple[Unit, ...]:
    """List the units of a UNet in the order of its forward pass.

    Streams that have but one channel in each GroupNorm group cannot be cut and are left out.

    Raises:
        UnsupportedModelError: The UNet has a block of an unknown kind.
    """
    found = parts(config)
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


def units_for(config: UNetConfig, kept: Kept) -> tuple[Unit, ...]:
    """List the units that a choice was made among."""
    return units_of(config, "full" if any(name.startswith(STREAM) for name in kept) else "inner")


def widths_of(kept: Kept) -> dict[str, int]:
    """Tell how many steps of each unit a choice keeps."""
    return {name: len(steps) for name, steps in kept.items()}


def name_of(kept: Kept) -> str:
    """Give a choice a short name, another one for every choice."""
    document = json.dumps({name: list(steps) for name, steps in sorted(kept.items())})
    return hashlib.sha256(document.encode()).hexdigest()[:8]


def keep_all(units: tuple[Unit, ...]) -> dict[str, tuple[int, ...]]:
    """Give the choice that cuts nothing."""
    return {unit.name: tuple(range(unit.width)) for unit in units}


def _inner_unit(part: ResidualBlock | AttentionBlock) -> Unit:
    kind: Literal["residual", "attention"]
    if isinstance(part, AttentionBlock):
        kind, width = "attention", part.num_heads
    else:
        kind, width = "residual", part.num_groups
    return Unit(part.name, kind, width, part.inner.count // width, part.pixels)

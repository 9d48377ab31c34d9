"""The units of a network: what can be pruned as a whole.

Inner units are the inner width of a residual block, in whole GroupNorm groups, an attention's
heads, and the inner width of a transformer's feed-forward. Pruning them leaves the residual
stream, the skip connections and the statistics of the groups that are kept as they were, so macs
and parameters add up over them.

Stream units are the width of the residual stream itself, from where a convolution starts it to
where the next one does; whatever adds to it or reads it, skip connections too, is pruned with it.
A step has one channel of each of its GroupNorm groups, so that norms of the stream keep their
groups; a norm that reads a skip beside it has other groups once its parts are narrower.

In the space ``depth`` inner units may keep nothing: then the whole branch goes, with its norm, its
modulation and its last bias, and a block goes with the last of its branches.

Traced units are the heads and channels of networks that have no description (``models.traced``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tdc_ray.storage.digest import json_digest

KeptIndices = Mapping[str, tuple[int, ...]]
"""For every unit, which of its steps (groups, heads, slices of the stream) are kept, rising."""

SpaceKind = Literal["inner", "full", "depth"]
"""Inner units alone, or the stream's too, or inner units of branches that may go as a whole."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A block's inner width, an attention's heads or the width of the stream."""

    name: str
    """Dotted name of the block in the network; for a stream, of the module that starts it, after
    ``stream:``."""

    kind: Literal["residual", "attention", "feed-forward", "stream", "traced"]

    width: int
    """How many steps there are: GroupNorm groups, heads, channels of a feed-forward, or slices of
    the stream."""

    channels: int
    """Channels of one step."""

    pixels: int
    """Height times width of the block's output; of a transformer the tokens."""

    multiple: int = 1
    """The number of channels that are kept should be a multiple of it."""

    least: int = 1
    """The fewest steps that may be kept; 0 where the whole branch may go."""

    @property
    def has_step(self) -> bool:
        """Whether it lies within a step of its name (``models.step``), which runs by itself."""
        return self.kind not in ("stream", "traced")

    @property
    def legal_widths(self) -> tuple[int, ...]:
        """Widths that it may keep, rising: those whose channels are a multiple, and its own."""
        narrower = range(self.least, self.width)
        return (*(w for w in narrower if w * self.channels % self.multiple == 0), self.width)

    def channel_indices(self, steps: Iterable[int]) -> list[int]:
        """Return which of the unit's channels belong to steps: rising where these rise."""
        if self.kind == "stream":  # one channel of each group
            kept = tuple(steps)
            return [group * self.width + step for group in range(self.channels) for step in kept]
        return [step * self.channels + i for step in steps for i in range(self.channels)]


def widths_of(kept: KeptIndices) -> dict[str, int]:
    """Return how many steps of each unit are kept."""
    return {name: len(steps) for name, steps in kept.items()}


def kept_digest(kept: KeptIndices) -> str:
    """Return a digest of what is kept."""
    return json_digest({name: list(steps) for name, steps in kept.items()})[:8]


def keep_everything(units: tuple[Unit, ...]) -> dict[str, tuple[int, ...]]:
    """Return the indices of all steps: nothing is pruned."""
    return {unit.name: tuple(range(unit.width)) for unit in units}

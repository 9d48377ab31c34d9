"""The layers of a network, and which of their channels are pruned together."""

from collections.abc import Iterator
from dataclasses import dataclass

STREAM = "stream:"
"""Prefix of the names of the residual stream's units; the module that starts the stream
follows."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Adjacent channels that are pruned as one."""

    count: int

    unit: str | None = None
    """Name of the unit that they belong to; None means that they are never narrowed."""

    branches: tuple[str, ...] = ()
    """Units of branches that an output serves: with the last of these it goes as a whole."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A module that has weights: one or more for every pair of an input and an output channel."""

    name: str
    """Its dotted name in the network."""

    inputs: tuple[Channels, ...]
    """Along dimension 1 of its weight. A norm's weight has no such dimension: it counts as 1. An
    embedding's dimensions are swapped, but never pruned."""

    outputs: tuple[Channels, ...]
    """Along dimension 0 of its weight, and of its bias."""

    kernel_area: int = 1
    pixels: int = 0
    """Height times width of the output; 0 for norms and embeddings, whose macs do not count."""

    has_bias: bool = True

    has_weight: bool = True
    """False for products of activations, as inside attention, which cost macs alone."""

    @property
    def num_params(self) -> int:
        """Parameters of the unpruned layer."""
        if not self.has_weight:
            return 0
        bias = total(self.outputs) if self.has_bias else 0
        return self._num_weights + bias

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the unpruned layer for one image."""
        return self._num_weights * self.pixels

    @property
    def _num_weights(self) -> int:
        return total(self.inputs) * total(self.outputs) * self.kernel_area


def channel_offsets(unit: str, channels: tuple[Channels, ...]) -> Iterator[int]:
    """Yield where a unit's channels begin along a dimension."""
    offset = 0
    for run in channels:
        if run.unit == unit:
            yield offset
        offset += run.count


def total(channels: tuple[Channels, ...]) -> int:
    """Count the channels along a dimension."""
    return sum(run.count for run in channels)

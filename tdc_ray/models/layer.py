"""The layers of a network, and which of their channels are cut together."""

from dataclasses import dataclass

STREAM = "stream:"
"""Begins the names of the residual stream's units; the module that starts the stream follows."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Channels that lie side by side and are cut as one."""

    count: int

    unit: str | None = None
    """Name of the unit that cuts them; None means that they are never cut."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A module that has weights: one or more for every pair of an input and an output channel."""

    name: str
    """Its dotted name in the network."""

    inputs: tuple[Channels, ...]
    """Along dimension 1 of its weight. A norm's weight has no such dimension: it counts as 1. An
    embedding's dimensions are the other way round, but nothing cuts them."""

    outputs: tuple[Channels, ...]
    """Along dimension 0 of its weight, and of its bias."""

    kernel_area: int = 1
    pixels: int = 0
    """Height times width of the output; 0 for norms and embeddings, whose macs do not count."""

    has_bias: bool = True

    @property
    def num_params(self) -> int:
        """Parameters of the uncut layer."""
        bias = total(self.outputs) if self.has_bias else 0
        return self._num_weights + bias

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the uncut layer for one image."""
        return self._num_weights * self.pixels

    @property
    def _num_weights(self) -> int:
        return total(self.inputs) * total(self.outputs) * self.kernel_area


def total(channels: tuple[Channels, ...]) -> int:
    """Count the channels that follow each other along a dimension."""
    return sum(run.count for run in channels)

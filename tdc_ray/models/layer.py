"""What a UNet is made of: layers, and which of their channels are cut together."""

from collections.abc import Iterator
from dataclasses import dataclass

STREAM = "stream:"
"""Begins the names of the residual stream's units; the module that starts the stream follows."""


@dataclass(frozen=True, slots=True)
class Channels:
    """Channels that lie side by side and are cut as one."""

    count: int

    unit: str | None = None
    """Whose they are: a block's (its inner width), a stream's, or nobody's (never cut)."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A module that has weights: one or more for every pair of an input and an output channel."""

    name: str
    """Its dotted name in the ``UNet2DModel``."""

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


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """A ``ResnetBlock2D``: its inner width lies between ``conv1`` and ``conv2``."""

    name: str
    inputs: tuple[Channels, ...]
    """The stream, and the skip connection where there is one."""

    stream: Channels
    """What it adds to, or starts where it has a ``conv_shortcut``."""

    time_channels: int
    num_groups: int
    scale_shift: bool
    pixels: int
    """Height times width of its output."""

    @property
    def in_channels(self) -> int:
        """How many channels it reads."""
        return total(self.inputs)

    @property
    def streams(self) -> tuple[Channels, ...]:
        """The streams that it reads or writes."""
        return (*self.inputs, self.stream)

    @property
    def inner(self) -> Channels:
        """Between ``conv1`` and ``conv2``."""
        return Channels(self.stream.count, self.name)


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """An ``Attention``: its inner width is ``num_heads`` heads of equal width."""

    name: str
    stream: Channels
    """What it reads and adds to."""

    num_heads: int
    num_groups: int | None
    """Of its ``group_norm``, if it has one."""

    pixels: int

    @property
    def streams(self) -> tuple[Channels, ...]:
        """The streams that it reads or writes."""
        return (self.stream,)

    @property
    def inner(self) -> Channels:
        """All heads."""
        return Channels(self.stream.count, self.name)


Part = Layer | ResidualBlock | AttentionBlock


def total(channels: tuple[Channels, ...]) -> int:
    """Add up the channels that follow each other along a dimension."""
    return sum(some.count for some in channels)


def starts_of(unit: str, channels: tuple[Channels, ...]) -> Iterator[int]:
    """Tell where a unit's channels begin along a dimension."""
    start = 0
    for some in channels:
        if some.unit == unit:
            yield start
        start += some.count


def norm(name: str, *channels: Channels) -> Layer:
    """Make a ``GroupNorm``."""
    return Layer(name, (Channels(1),), channels)


def conv(
    name: str, inputs: tuple[Channels, ...], outputs: Channels, kernel: int, pixels: int
) -> Layer:
    """Make a ``Conv2d``."""
    return Layer(name, inputs, (outputs,), kernel**2, pixels)


def linear(name: str, inputs: Channels, *outputs: Channels, pixels: int = 1) -> Layer:
    """Make a ``Linear``."""
    return Layer(name, (inputs,), outputs, pixels=pixels)

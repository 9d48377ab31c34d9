"""The blocks of a UNet2DModel as layers, with the channels that each reads and writes."""

from dataclasses import dataclass

from tdc_ray.models.layer import Channels, Layer, total


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """A ``ResnetBlock2D``: its inner width lies between ``conv1`` and ``conv2``."""

    name: str
    inputs: tuple[Channels, ...]
    """The stream, and the skip connection where there is one."""

    stream: Channels
    """The stream that it adds to, or starts if it has a ``conv_shortcut``."""

    time_channels: int
    num_groups: int
    scale_shift: bool
    pixels: int
    """Height times width of its output."""

    @property
    def in_channels(self) -> int:
        """Number of channels that it reads."""
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
    """The stream that it reads and adds to."""

    num_heads: int
    num_groups: int | None
    """Groups of its ``group_norm``, if it has one."""

    pixels: int

    @property
    def streams(self) -> tuple[Channels, ...]:
        """The streams that it reads or writes."""
        return (self.stream,)

    @property
    def inner(self) -> Channels:
        """All heads."""
        return Channels(self.stream.count, self.name)


Block = Layer | ResidualBlock | AttentionBlock


def norm(name: str, *channels: Channels) -> Layer:
    """Describe a ``GroupNorm``."""
    return Layer(name, (Channels(1),), channels)


def conv(
    name: str, inputs: tuple[Channels, ...], outputs: Channels, kernel: int, pixels: int
) -> Layer:
    """Describe a ``Conv2d``."""
    return Layer(name, inputs, (outputs,), kernel**2, pixels)


def linear(name: str, inputs: Channels, *outputs: Channels, pixels: int = 1) -> Layer:
    """Describe a ``Linear``."""
    return Layer(name, (inputs,), outputs, pixels=pixels)

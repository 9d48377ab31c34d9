"""The layers and units of a network by its config, without building it; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tdc_ray.models.dit import layers as dit
from tdc_ray.models.layer import STREAM, Layer
from tdc_ray.models.network_config import (
    CONDITION_CLASS,
    DIT_CLASS,
    PIXART_CLASS,
    SD3_CLASS,
    NetworkConfig,
    class_name,
    row_of,
)
from tdc_ray.models.pixart import layers as pixart
from tdc_ray.models.sd3 import layers as sd3
from tdc_ray.models.unet2d.layers import all_layers
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.unet2d_condition import layers as condition
from tdc_ray.models.units import KeptIndices, SpaceKind, Unit


@dataclass(frozen=True, slots=True)
class NetworkStructure:
    """The layers of an unpruned network, and its units."""

    layers: Sequence[Layer]
    """Those that have parameters, in the order of the forward pass."""

    units: tuple[Unit, ...]
    """What can be pruned, in the same order."""

    @property
    def macs(self) -> int:
        """Macs of one forward pass for one image.

        They are those of convolutions and linear layers; a UNet's are without the two products
        inside attention, as the paper counts them (it calls them FLOPs), a transformer's with
        them, as is usual there.
        """
        return sum(layer.macs for layer in self.layers)

    @property
    def num_params(self) -> int:
        """Number of its parameters."""
        return sum(layer.num_params for layer in self.layers)


STRUCTURES: Mapping[
    str,
    tuple[
        Callable[[NetworkConfig], Sequence[Layer]],
        Callable[[NetworkConfig, SpaceKind], tuple[Unit, ...]],
    ],
] = {
    "UNet2DModel": (all_layers, units_of),
    DIT_CLASS: (dit.all_layers, dit.units_of),
    PIXART_CLASS: (pixart.all_layers, pixart.units_of),
    SD3_CLASS: (sd3.all_layers, sd3.units_of),
    CONDITION_CLASS: (condition.all_layers, condition.units_of),
}
"""By the network's class: the functions that derive its layers and its units from a config."""


def network_structure(config: NetworkConfig, kind: SpaceKind = "inner") -> NetworkStructure:
    """Return the structure of a network, with the inner units alone or those of the stream too.

    Raises:
        UnsupportedModelError: The network's class, or a block of it, is of an unknown kind.
    """
    layers, units = row_of(STRUCTURES, class_name(config))
    return NetworkStructure(layers(config), units(config, kind))


def layers_of(name: str, config: NetworkConfig) -> Sequence[Layer]:
    """Return the layers of a network of a class, in the order of the forward pass.

    Raises:
        UnsupportedModelError: The network's class, or a block of it, is of an unknown kind.
    """
    return row_of(STRUCTURES, name)[0](config)


CAPTION_SHAPES: Mapping[str, Callable[[NetworkConfig], Mapping[str, tuple[int, ...]]]] = {
    PIXART_CLASS: pixart.caption_shapes,
    SD3_CLASS: sd3.caption_shapes,
    CONDITION_CLASS: condition.caption_shapes,
}
"""By the network's class, if it is conditioned on text: what it reads of a caption."""


def caption_shapes(name: str, config: NetworkConfig) -> Mapping[str, tuple[int, ...]]:
    """Return what a network of a class reads of a caption: shapes by its arguments' names.

    As many tokens as macs are counted for; nothing, if it is not conditioned on text.
    """
    return CAPTION_SHAPES[name](config) if name in CAPTION_SHAPES else {}


def units_for(config: NetworkConfig, kept: KeptIndices) -> tuple[Unit, ...]:
    """Return the units among which those that are kept were chosen."""
    kind: SpaceKind = "full" if any(name.startswith(STREAM) for name in kept) else "inner"
    return network_structure(config, kind).units

"""The layers and units of a network by its config, without building it; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tdc_ray.models.layer import STREAM, Layer
from tdc_ray.models.network_config import (
    CONDITION_CLASS,
    CaptionSize,
    NetworkConfig,
    class_name,
    row_of,
)
from tdc_ray.models.transformers.table import TRANSFORMERS
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
    **{name: (one.all_layers, one.units_of) for name, one in TRANSFORMERS.items()},
    CONDITION_CLASS: (condition.all_layers, condition.units_of),
}
"""By the network's class: the functions that derive its layers and its units from a config."""

TEXT_CLASSES = (CONDITION_CLASS, *(name for name, one in TRANSFORMERS.items() if one.captions))
"""Classes of networks that are conditioned on captions."""


def reads_text(config: Mapping[str, Any]) -> bool:
    """Whether a network of a config is conditioned on captions."""
    return class_name(config) in TEXT_CLASSES


def caption_size(name: str, config: NetworkConfig) -> CaptionSize:
    """Return how large the captions are of a network of a class that is conditioned on them."""
    if name == CONDITION_CLASS:
        return condition.caption_size(config)
    transformer = TRANSFORMERS[name]
    assert transformer.captions is not None
    return transformer.captions(transformer.settings_of(config))


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


def units_for(config: NetworkConfig, kept: KeptIndices) -> tuple[Unit, ...]:
    """Return the units among which those that are kept were chosen."""
    kind: SpaceKind = "full" if any(name.startswith(STREAM) for name in kept) else "inner"
    return network_structure(config, kind).units

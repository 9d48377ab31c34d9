"""The layers and units of a network by its config, without building it; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.layer import STREAM, Layer
from tdc_ray.models.network_config import (
    CONDITION_CLASS,
    CaptionShapes,
    NetworkConfig,
    class_name,
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


Structure = tuple[
    Callable[[NetworkConfig], Sequence[Layer]],
    Callable[[NetworkConfig, SpaceKind], tuple[Unit, ...]],
]
"""The functions that derive a network's layers and its units from its config."""

STRUCTURES: Mapping[str, Structure] = {
    "UNet2DModel": (all_layers, units_of),
    **{name: (one.all_layers, one.units_of) for name, one in TRANSFORMERS.items()},
    CONDITION_CLASS: (condition.all_layers, condition.units_of),
}
"""By the network's class."""

TEXT_CLASSES = (CONDITION_CLASS, *(name for name, one in TRANSFORMERS.items() if one.captions))
"""Classes of networks that are conditioned on captions."""


def reads_text(config: Mapping[str, Any]) -> bool:
    """Whether a network of a config is conditioned on captions."""
    return class_name(config) in TEXT_CLASSES


def caption_shapes(name: str, config: NetworkConfig) -> CaptionShapes:
    """Return what a network of a class reads of a caption.

    As many tokens as macs are counted for; nothing, if it is not conditioned on captions.
    """
    if name == CONDITION_CLASS:
        return condition.caption_shapes(config)
    if name in TRANSFORMERS:
        transformer = TRANSFORMERS[name]
        read = transformer.captions
        return {} if read is None else read(transformer.settings_of(config))
    if name in STRUCTURES:
        return {}
    from tdc_ray.models.traced.graph import caption_shapes_by_name

    return caption_shapes_by_name(name, config)


def network_structure(config: NetworkConfig, kind: SpaceKind = "inner") -> NetworkStructure:
    """Return the structure of a network, with the units of a space.

    Raises:
        UnsupportedModelError: The network's class, or a block of it, is of an unknown kind, or its
            units cannot be traced, or not pruned as the space has it.
    """
    name = class_name(config)
    if kind == "depth" and name not in TRANSFORMERS:
        raise UnsupportedModelError(
            f"prune.space must not be depth for a {name}: branches are removed as a whole of "
            f"{', '.join(TRANSFORMERS)} alone. Set prune.space to inner."
        )
    layers, units = _row(name)
    return NetworkStructure(layers(config), units(config, kind))


def layers_of(name: str, config: NetworkConfig) -> Sequence[Layer]:
    """Return the layers of a network of a class, in the order of the forward pass.

    Raises:
        UnsupportedModelError: The network's class, or a block of it, is of an unknown kind, or its
            units cannot be traced.
    """
    return _row(name)[0](config)


def _row(name: str) -> Structure:
    """Return the functions of a class; one of diffusers' that has no row is traced.

    Raises:
        UnsupportedModelError: diffusers has no such class, or it is none of a denoiser.
    """
    if name in STRUCTURES:
        return STRUCTURES[name]
    from tdc_ray.models.traced.graph import check_denoiser, layers_by_name, units_by_name

    check_denoiser(name, STRUCTURES)
    return partial(layers_by_name, name), partial(units_by_name, name)


def units_for(config: NetworkConfig, kept: KeptIndices) -> tuple[Unit, ...]:
    """Return the units among which those that are kept were chosen."""
    kind: SpaceKind = "inner" if all(kept.values()) else "depth"
    if any(name.startswith(STREAM) for name in kept):
        kind = "full"
    return network_structure(config, kind).units

"""How a class of transformers is described."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.encoding import Encoding
from tdc_ray.models.layer import Layer
from tdc_ray.models.network_config import CaptionShapes
from tdc_ray.models.units import SpaceKind, Unit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tdc_ray.models.step import Step
    from tdc_ray.models.transformers.steps import Shift


class Ends(NamedTuple):
    """Dotted names of the modules at both ends of a network."""

    patches: str
    """Embeds patches; its convolution is ``proj``."""

    norm: str
    output: str
    """The linear layer to the pixels of patches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """A class of transformers of diffusers; ``Any`` are a network, or its settings."""

    name: str
    """diffusers' name of the class."""

    settings_of: Callable[[Mapping[str, Any]], Any]
    """Reads the settings of a config, with diffusers' defaults for those left out."""

    units: Callable[[Any], Iterable[Unit]]
    """Lists the units, in the order of the forward pass, of a network's settings."""

    layers: Callable[[Any, Mapping[str, Unit]], Iterable[Layer]]
    """Lists the layers that have parameters, and products, in the same order, of settings and
    units by name."""

    ends: Ends
    embed: Callable[[Any, "Tensor", "Tensor", Any], tuple["Tensor", "Tensor | None"]]
    """Embeds noised images' timesteps and labels: ``(B, E)`` or ``(B, L, E)``, and context."""

    blocks: Callable[[Any], Sequence["Step"]]
    """Splits the blocks of a network into steps."""

    remaining_block: Callable[[Any, Collection[str], bool], "nn.Module"]
    """Returns what stays of a block, without some branches by their names in it; whether it is the
    first one."""

    last_shift: Callable[[Any], "Shift"]
    """Returns what shifts and scales the output of the last norm of a network."""

    captions: Callable[[Any], CaptionShapes] | None = None
    """By settings; None for networks that are not conditioned on captions."""

    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    """What text encoders make of a prompt for it, by what the name of a pipeline's class begins
    with."""

    zero_at_first: Callable[[Any], Iterable["nn.Linear"]] | None = None
    """Lists the layers of a network that are 0 before training; None leaves all as diffusers
    has them."""

    def units_of(self, config: Mapping[str, Any], kind: SpaceKind = "inner") -> tuple[Unit, ...]:
        """Return the units of a network by its config.

        Raises:
            UnsupportedModelError: The stream is to be pruned, too, or a setting is not supported.
        """
        check_inner(kind)
        least = 0 if kind == "depth" else 1
        return tuple(replace(unit, least=least) for unit in self.units(self.settings_of(config)))

    def all_layers(self, config: Mapping[str, Any]) -> Sequence[Layer]:
        """Return the layers of a network by its config, in the order of the forward pass."""
        settings = self.settings_of(config)
        return list(self.layers(settings, {unit.name: unit for unit in self.units(settings)}))


def check_inner(kind: SpaceKind) -> None:
    """Check that what is to be pruned are inner units alone.

    Raises:
        UnsupportedModelError: The stream is to be pruned, too.
    """
    if kind == "full":
        raise UnsupportedModelError(
            "a transformer's stream cannot be pruned: set prune.space to inner, which has its "
            "heads and feed-forwards, or to depth, in which these may go as a whole."
        )


def single_blocks(network: Any) -> "Sequence[Step]":
    """Split the blocks of a network whose adaptive norm serves all of them (adaLN-single)."""
    from tdc_ray.models.transformers import steps

    return steps.single_blocks(network)


def remaining_single_block(block: Any, gone: Collection[str], is_first: bool) -> "nn.Module":  # noqa: FBT001
    """Return what stays of a block of such a network without some branches."""
    from tdc_ray.models.transformers.remaining import RemainingSingleBlock

    del is_first
    return RemainingSingleBlock(block, gone)


def single_last_shift(network: Any) -> "Shift":
    """Return what shifts and scales the output of the last norm of such a network."""
    from tdc_ray.models.transformers import steps

    return partial(steps.single_shift, network.scale_shift_table)

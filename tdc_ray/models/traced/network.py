"""Runs a network that has no description, as a single step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn

from tdc_ray.models.labels import Labels
from tdc_ray.models.network_config import STATES, NetworkConfig
from tdc_ray.models.step import Ends, State, Step
from tdc_ray.models.traced.graph import call, traced


def build(kind: type[ModelMixin], config: NetworkConfig) -> Any:
    """Build a network of a class with random weights on the current default device."""
    arguments: dict[str, Any] = {key: value for key, value in config.items() if key[0] != "_"}
    return kind(**arguments)


def ends(network: Any) -> Ends:
    """Return the first and the last layer, and the last norm."""
    layers = _layers_of(network)
    norms = [one for one in network.modules() if isinstance(one, nn.GroupNorm | nn.LayerNorm)]
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), layers[0])
    return Ends(first, norms[-1] if norms else None, layers[-1])


def start(network: Any, x_t: Tensor, timesteps: Tensor, labels: Labels) -> State:
    """Return the state before the step, which holds what the network is called with."""
    del network
    context = labels[STATES] if isinstance(labels, Mapping) else labels
    return State(x_t, timesteps, context=context)


def steps(network: Any) -> list[Step]:
    """Return the forward pass as one step; its module has the layers in their order."""
    step = WholeStep(
        name="network",
        module=_InOrder(_layers_of(network)),
        output_layers={"hidden": ""},
        network=network,
    )
    return [step]


def _layers_of(network: Any) -> list[Any]:
    order = traced(type(network).__name__, network.config).order
    return [network.get_submodule(name) for name in order]


class _InOrder(nn.Module):
    """Holds layers of a network in the order of the forward pass, by their numbers."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeStep(Step):
    """A whole network: layers that read what was pruned are refitted one after the other."""

    network: Any

    def __call__(self, state: State) -> State:
        """Run the step."""
        return replace(
            state, hidden=call(self.network, state.hidden, state.embedding, state.context)
        )

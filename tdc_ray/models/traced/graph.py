"""Layers and units of a network of any class of diffusers, found by running it once.

Units are the heads of diffusers' ``Attention``, and channels that one layer alone reads, by
Torch-Pruning's dependency graph: those whose cut network does what the whole one does without
these channels, which is tried on random weights.
"""

import copy
import inspect
import json
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import diffusers
import torch
import torch_pruning as tp
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.diffusers_folder import MALFORMED
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.network_config import (
    STATES,
    CaptionShapes,
    NetworkConfig,
    image_size,
    num_class_embeds,
)
from tdc_ray.models.surgery import cut_units
from tdc_ray.models.units import SpaceKind, Unit

WIDTHS_OF_CAPTIONS = (
    "caption_channels",
    "joint_attention_dim",
    "encoder_hid_dim",
    "cross_attention_dim",
)
"""Settings that say how many channels the states of a caption have; the first that is set does."""

CAPTION_TOKENS = 77
"""Tokens of a caption that macs are counted for."""

SCALE = 0.05
"""Standard deviation of what is added to all weights, so that none is 0, to try cuts."""

TOLERANCE = 1e-3
"""Largest difference of two networks' outputs that count as the same, as a share of the largest
value; those of a cut that changes something are of the same size as the values."""

HEADS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
OUTPUTS = ("to_out.0", "to_add_out")
"""Layers of an ``Attention`` that write its heads, and that read them."""

logger = logging.getLogger(__name__)

ReadLayer = nn.Conv2d | nn.Linear

Dims = Mapping[tuple[str, int], tuple[int, ...]]
"""Where a unit's channels begin, by a layer's name and a dimension of its weight."""


@dataclass(frozen=True, slots=True)
class Traced:
    """What a network consists of."""

    layers: tuple[Layer, ...]
    """In the order of the forward pass; the products inside attention are not among them."""

    units: tuple[Unit, ...]
    order: tuple[str, ...]
    """Names of the convolutions and linear layers, in the order of the forward pass."""


def class_of(name: str) -> type[ModelMixin] | None:
    """Return diffusers' class of models of a name; None if it has none."""
    kind = getattr(diffusers, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, ModelMixin) else None


def check_denoiser(name: str, known: Collection[str]) -> type[ModelMixin]:
    """Return diffusers' class of denoisers of a name.

    Args:
        name: The class's name.
        known: Names of classes that are described.

    Raises:
        UnsupportedModelError: It has none.
    """
    kind = class_of(name)
    if kind is None or "timestep" not in _arguments(kind):
        why = "diffusers has no such model" if kind is None else "it takes no timestep"
        raise UnsupportedModelError(
            f"a {name} is not supported: {why}; known are {', '.join(known)}, and other models of "
            "diffusers that take images and timesteps."
        )
    return kind


def takes_captions(kind: type[Any]) -> bool:
    """Whether a class's networks are conditioned on captions."""
    return STATES in _arguments(kind)


def takes_images_alone(name: str) -> bool:
    """Whether a name is that of diffusers' denoisers that are not conditioned on captions."""
    kind = class_of(name)
    return kind is not None and "timestep" in _arguments(kind) and not takes_captions(kind)


def _arguments(kind: type[Any]) -> Collection[str]:
    return inspect.signature(kind.forward).parameters


def call(network: Any, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
    """Call a network on noised images, timesteps and what it is conditioned on.

    Args:
        network: Of any class.
        x_t: ``(B, C, H, W)``
        timesteps: ``(B,)``
        labels: Classes, ``(B,)``, or the states of captions, ``(B, S, C)``.
    """
    name = STATES if takes_captions(type(network)) else "class_labels"
    conditions = {} if labels is None else {name: labels}
    output: Tensor = network(x_t, timestep=timesteps, **conditions).sample
    return output


def caption_shapes_by_name(name: str, config: Mapping[str, Any]) -> CaptionShapes:
    """Return what a network of a class reads of a caption; nothing, if it takes none.

    Raises:
        UnsupportedModelError: Its config does not say how wide captions are.
    """
    kind = class_of(name)
    if kind is None or not takes_captions(kind):
        return {}
    found = [config.get(name) for name in WIDTHS_OF_CAPTIONS]
    channels = next((value for value in found if isinstance(value, int)), None)
    if channels is None:
        raise UnsupportedModelError(
            "the config of a network that is conditioned on captions must say how wide they are, "
            f"by one of {', '.join(WIDTHS_OF_CAPTIONS)}."
        )
    return {STATES: (CAPTION_TOKENS, channels)}


def layers_by_name(name: str, config: NetworkConfig) -> Sequence[Layer]:
    """Return the layers of a network of a class, in the order of the forward pass."""
    return traced(name, config).layers


def units_by_name(name: str, config: NetworkConfig, kind: SpaceKind) -> tuple[Unit, ...]:
    """Return the units of a network of a class, in the order of the forward pass.

    Raises:
        UnsupportedModelError: The stream is to be pruned, too, or there is nothing to prune.
    """
    if kind == "full":
        raise UnsupportedModelError(
            f"the stream of a {name} cannot be pruned: set prune.space to inner."
        )
    if not (units := traced(name, config).units):
        raise UnsupportedModelError(
            f"a {name} has no description here, and no heads and no channels that a single layer "
            "reads were found in it."
        )
    return units


def traced(name: str, config: NetworkConfig) -> Traced:
    """Return what a network of a class consists of, by its config.

    Raises:
        UnsupportedModelError: It cannot be built, run or traced.
    """
    arguments = inspect.signature(check_denoiser(name, ())).parameters
    known = {key: config.get(key, one.default) for key, one in arguments.items()}
    return _traced(name, json.dumps(known, sort_keys=True))


@lru_cache(maxsize=8)
def _traced(name: str, document: str) -> Traced:
    config, kind = json.loads(document), check_denoiser(name, ())
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.device("cpu"))
            torch.manual_seed(0)
            inputs = _inputs(kind, config)
            network: Any = kind(**config).eval().requires_grad_(requires_grad=True)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(SCALE * torch.randn_like(parameter))
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unwrapped parameters")  # none is cut
                return _Tracer(network, inputs).trace()
    except MALFORMED as error:
        raise UnsupportedModelError(
            f"a {name} has no description here, and what can be pruned of it could not be found "
            "by running it on an image, a timestep and, if it takes one, a label: "
            f"{type(error).__name__}: {error}"
        ) from error


def _inputs(kind: type[ModelMixin], config: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return an image, a timestep and a label for a network of a class."""
    labels = None
    if captions := caption_shapes_by_name(kind.__name__, config):
        labels = torch.randn(1, *captions[STATES])
    elif num_class_embeds(config) is not None:
        labels = torch.zeros(1, dtype=torch.long)
    images = torch.randn(1, config["in_channels"], *image_size(config))
    return images, torch.full((1,), 500), labels


@dataclass(frozen=True, slots=True)
class _Owned:
    """A unit, and where its channels are."""

    unit: Unit
    readers: tuple[str, ...]
    """The layers that read it."""

    dims: Dims


class _Tracer:
    """Runs a network, and asks the graph what is coupled."""

    def __init__(self, network: Any, inputs: tuple[Tensor, Tensor, Tensor | None]) -> None:
        self._network, self._inputs = network, inputs
        self._modules: dict[str, nn.Module] = dict(network.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._positions: Counter[str] = Counter()
        """How often a layer's weights are applied for an image, by its name, in forward order."""

        self._read: set[str] = set()
        """Layers that are applied to more than one vector of an image."""

    def trace(self) -> Traced:
        """Return what the network consists of."""
        self._count_positions()
        found = [*self._attentions()]
        try:
            found += self._by_graph()
        except MALFORMED as error:
            if not found:
                raise
            name = type(self._network).__name__
            logger.warning("of a %s heads alone can be pruned: Torch-Pruning: %s", name, error)
        order = {name: place for place, name in enumerate(self._positions)}
        owned = self._sound(sorted(found, key=lambda one: order[one.readers[0]]))
        return Traced(
            tuple(self._layers(owned)), tuple(one.unit for one in owned), tuple(self._positions)
        )

    def _count_positions(self) -> None:
        def count(module: nn.Module, _: object, output: Tensor) -> None:
            name = self._names[module]
            channels = output.shape[1 if isinstance(module, nn.Conv2d) else -1]
            self._positions[name] += output.numel() // channels
            if output.ndim > 2:
                self._read.add(name)

        layers = [one for one in self._names if isinstance(one, ReadLayer)]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        call(self._network, *self._inputs)
        for hook in hooks:
            hook.remove()

    def _attentions(self) -> Iterator[_Owned]:
        """Yield the heads of diffusers' own attentions."""
        for name, module in self._modules.items():
            if not isinstance(module, Attention) or module.inner_dim != module.inner_kv_dim:
                continue
            parts = {part: f"{name}.{part}" for part in (*HEADS, *OUTPUTS)}
            called = {part: layer for part, layer in parts.items() if layer in self._positions}
            readers = tuple(called[part] for part in OUTPUTS if part in called)
            if readers and "to_q" in called and module.inner_dim % module.heads == 0:
                size = module.inner_dim // module.heads
                unit = Unit(name, "traced", module.heads, size, self._positions[readers[0]])
                dims = {(called[part], 0): (0,) for part in HEADS if part in called}
                yield _Owned(unit, readers, dims | {(reader, 1): (0,) for reader in readers})

    def _by_graph(self) -> list[_Owned]:
        """Return the units that Torch-Pruning's graph finds."""
        graph = tp.DependencyGraph().build_dependency(
            self._network, self._inputs, forward_fn=lambda network, given: call(network, *given)
        )
        found = [*self._channels(graph)]
        for node in graph.module2node.values():
            vars(node).clear()  # nodes form cycles, which would keep the model's memory
        return found

    def _channels(self, graph: tp.DependencyGraph) -> Iterator[_Owned]:
        """Yield channels that one layer outside of attentions reads."""
        within = tuple(
            f"{name}." for name, one in self._modules.items() if isinstance(one, Attention)
        )
        for name in self._positions:
            module = cast("ReadLayer", self._modules[name])
            is_plain = module in graph.module2node and not _is_grouped(module)
            if name not in self._read or name.startswith(within) or not is_plain:
                continue
            dims = self._coupled(graph, module)
            if dims is not None and len(dims) > 1:
                norms = [
                    norm.num_groups
                    for layer, _ in dims
                    if isinstance(norm := self._modules[layer], nn.GroupNorm)
                ]
                channels = module.weight.shape[1]
                width = min(norms, default=channels)
                unit = Unit(name, "traced", width, channels // width, self._positions[name])
                yield _Owned(unit, (name,), dims)

    def _coupled(self, graph: tp.DependencyGraph, reader: ReadLayer) -> Dims | None:
        """Return where the channels are that a layer reads; None if others read them, too."""
        channels = reader.weight.shape[1]
        pruner = graph.get_pruner_of_module(reader)
        group = graph.get_pruning_group(reader, pruner.prune_in_channels, range(channels))
        dims: dict[tuple[str, int], tuple[int, ...]] = {(self._names[reader], 1): (0,)}
        for item in group.items:
            module = item.dep.target.module
            if not graph.is_out_channel_pruning_fn(item.dep.handler) and module is reader:
                continue
            if module not in self._names:
                if isinstance(module, nn.Parameter):
                    return None
                continue  # a view, a sum, a product or the like
            offsets = _offsets(item.idxs, item.root_idxs, channels)
            is_written = graph.is_out_channel_pruning_fn(item.dep.handler)
            if not isinstance(module, ReadLayer | nn.GroupNorm):
                return None
            if isinstance(module, ReadLayer) and (not is_written or _is_grouped(module)):
                return None
            weight = module.get_parameter("weight") if list(module.parameters()) else None
            if weight is None or len(offsets) * channels != len(weight):
                return None
            dims[self._names[module], 0] = offsets
        return dims

    def _sound(self, found: Sequence[_Owned]) -> list[_Owned]:
        """Return the units whose cut network equals the whole one without their channels."""
        if not found or self._is_sound(found):
            return [*found]
        half = len(found) // 2
        return [] if half == 0 else [*self._sound(found[:half]), *self._sound(found[half:])]

    @torch.no_grad()
    def _is_sound(self, owned: Sequence[_Owned]) -> bool:
        units = [one.unit for one in owned]
        kept = {unit.name: tuple(range((unit.width + 1) // 2)) for unit in units}
        pruned = cut_units(self._network, units, kept, [*self._layers(owned)])
        masked = copy.deepcopy(self._network)
        for one in owned:
            gone = one.unit.channel_indices(range(len(kept[one.unit.name]), one.unit.width))
            for reader in one.readers:
                masked.get_submodule(reader).weight[:, gone] = 0
        try:
            wanted, output = (call(network, *self._inputs) for network in (masked, pruned))
        except MALFORMED:
            return False
        return bool((output - wanted).abs().max() <= TOLERANCE * wanted.abs().max())

    def _layers(self, owned: Sequence[_Owned]) -> Iterator[Layer]:
        """Yield all that has parameters, in forward order; what is not called takes no macs."""
        order = {name: place for place, name in enumerate(self._positions)}
        dims = {key: (one.unit, offsets) for one in owned for key, offsets in one.dims.items()}
        for name, module in sorted(self._modules.items(), key=lambda one: order.get(one[0], -1)):
            weights = dict(module.named_parameters(recurse=False))
            if isinstance(module, ReadLayer | nn.GroupNorm | nn.LayerNorm) and "weight" in weights:
                weight = weights.pop("weight")
                has_bias = weights.pop("bias", None) is not None
                rows, columns = len(weight), 1 if weight.ndim == 1 else weight.shape[1]
                inputs, outputs = (
                    _runs(dims.get((name, 1)), columns),
                    _runs(dims.get((name, 0)), rows),
                )
                area = weight.numel() // (rows * columns)
                yield Layer(name, inputs, outputs, area, self._positions[name], has_bias)
            for key, other in weights.items():
                rows = other.shape[-1] if other.ndim else 1
                inputs, outputs = (Channels(other.numel() // rows),), (Channels(rows),)
                yield Layer(f"{name}.{key}".removeprefix("."), inputs, outputs, has_bias=False)


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1


def _offsets(indices: Sequence[int], roots: Sequence[int], count: int) -> tuple[int, ...]:
    """Return where copies of channels begin; nothing if these are in another order."""
    pairs = {*zip(roots, indices, strict=True)}
    offsets = sorted({index - root for root, index in pairs})
    expected = {(root, offset + root) for offset in offsets for root in range(count)}
    return tuple(offsets) if pairs == expected else ()


def _runs(owned: tuple[Unit, tuple[int, ...]] | None, count: int) -> tuple[Channels, ...]:
    """Return a dimension's channels: a unit's alone, once or more, or nobody's."""
    if owned is None:
        return (Channels(count),)
    unit, offsets = owned
    return tuple(Channels(unit.width * unit.channels, unit.name) for _ in offsets)

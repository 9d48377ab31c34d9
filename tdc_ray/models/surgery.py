"""Which tensors of a network have a unit's channels, and how they are cut, whatever its class."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.layer import Layer, channel_offsets
from tdc_ray.models.structure import layers_of
from tdc_ray.models.units import KeptIndices, Unit


@dataclass(frozen=True, slots=True)
class CoupledParameter:
    """A parameter that has a unit's channels along one of its dimensions."""

    layer: str
    """Dotted name of the module."""

    module: nn.Module
    name: str
    dim: int
    offsets: tuple[int, ...]
    """Offsets of the channels along the dimension. They may be there more than once: as scale and
    shift of a time embedding, or where a stream is its own skip connection."""

    num_channels: int

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        parameter = getattr(self.module, self.name)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def by_channel(self, values: Tensor) -> Tensor:
        """Reshape a tensor shaped like the parameter to ``(channels, everything else)``."""
        copies = [values.narrow(self.dim, offset, self.num_channels) for offset in self.offsets]
        rows = [part.movedim(self.dim, 0).reshape(self.num_channels, -1) for part in copies]
        return torch.cat(rows, dim=1)

    def keep(self, channels: Tensor) -> None:
        """Remove all but the given channels; the dimension must have no others."""
        old = self.parameter
        kept = old.detach().index_select(self.dim, self.indices(channels).to(old.device))
        new = nn.Parameter(kept.contiguous(), requires_grad=old.requires_grad)
        setattr(self.module, self.name, new)

    def indices(self, channels: Tensor) -> Tensor:
        """Return the indices of some of the unit's channels along the dimension."""
        return torch.cat([offset + channels for offset in self.offsets])


def coupled_parameters(
    network: Denoiser, unit: Unit, layers: Sequence[Layer] | None = None
) -> list[CoupledParameter]:
    """Return the parameters that have a unit's channels.

    Args:
        network: An unpruned network; for an inner unit, others may have been pruned.
        unit: One of its units.
        layers: Those of the network; None means as its class and config say.

    Raises:
        UnsupportedModelError: The network has no such unit.
    """
    count = unit.width * unit.channels
    if layers is None:
        layers = layers_of(type(network).__name__, network.config)
    coupled = [
        CoupledParameter(layer.name, network.get_submodule(layer.name), name, dim, offsets, count)
        for layer in layers
        for name, dim, channels in (
            ("weight", 0, layer.outputs),
            ("bias", 0, layer.outputs if layer.has_bias else ()),
            ("weight", 1, layer.inputs),
        )
        if layer.has_weight and (offsets := tuple(channel_offsets(unit.name, channels)))
    ]
    if not coupled:
        raise UnsupportedModelError(f"this network has no {unit.kind} unit {unit.name}.")
    return coupled


def kept_outputs(network: Denoiser, units: Sequence[Unit], kept: KeptIndices) -> dict[str, Tensor]:
    """Return which output channels stay of every convolution and linear layer that loses some.

    Args:
        network: An unpruned network.
        units: Its units.
        kept: What stays of each of them.

    Returns:
        Indices of the base's output channels, in order, by the layer's dotted name; without the
        layers of branches that are removed.
    """
    outputs = {}
    for unit in units:
        if 0 < len(kept[unit.name]) < unit.width:
            channels = torch.tensor(unit.channel_indices(kept[unit.name]))
            for coupled in coupled_parameters(network, unit):
                if coupled.dim == 0 and isinstance(coupled.module, nn.Conv2d | nn.Linear):
                    outputs[coupled.layer] = coupled.indices(channels)
    return outputs


def cut_units(
    network: Denoiser,
    units: Sequence[Unit],
    kept: KeptIndices,
    layers: Sequence[Layer] | None = None,
    remove: Callable[[Denoiser, Collection[str]], None] | None = None,
) -> Denoiser:
    """Return a copy of a network, all of whose units are inner ones, without what is not kept.

    diffusers' ``save_pretrained``, which would write a config without its widths, refuses it.

    Args:
        network: An unpruned network, which is not changed. It may be on the meta device.
        units: Its units.
        kept: What stays of each of them.
        layers: Those of the network; None means as its class and config say.
        remove: Removes branches, of which nothing is kept, by the names of their units, in place;
            None where at least one step of every unit is.
    """
    pruned = copy.deepcopy(network)
    narrower = [unit for unit in units if len(kept[unit.name]) < unit.width]
    if remove is not None:
        remove(pruned, [unit.name for unit in narrower if not kept[unit.name]])
    for unit in narrower:
        if kept[unit.name]:
            cut_inner(pruned, unit, kept[unit.name], layers)
    for module in pruned.modules():
        update_attributes(module)
    if narrower:
        vars(pruned)["save_pretrained"] = refuse_to_save
    return pruned


def cut_inner(
    network: Denoiser,
    unit: Unit,
    kept: tuple[int, ...],
    layers: Sequence[Layer] | None = None,
) -> None:
    """Remove the steps of an inner unit that are not kept, in place; see :func:`cut_units`."""
    channels = torch.tensor(unit.channel_indices(kept))
    for coupled in coupled_parameters(network, unit, layers):
        coupled.keep(channels)
        if isinstance(coupled.module, nn.GroupNorm):
            coupled.module.num_groups = len(kept)
    block = network.get_submodule(unit.name)
    if isinstance(block, Attention):
        block.heads = block.sliceable_head_dim = len(kept)


def update_attributes(module: nn.Module) -> None:
    """Set a module's width attributes to the widths of its weights: forward passes read them."""
    if isinstance(module, nn.Conv2d):
        if 1 < module.groups == module.out_channels:  # every channel by itself
            module.groups = len(module.weight)
        module.out_channels, inputs = module.weight.shape[:2]
        module.in_channels = inputs * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
    elif isinstance(module, Attention):
        module.inner_dim, module.query_dim = module.to_q.weight.shape
        module.inner_kv_dim, module.cross_attention_dim = module.to_k.weight.shape
        module.out_dim = len(module.to_out[0].weight)


def refuse_to_save(*_: object, **__: object) -> NoReturn:
    """Replace a pruned network's ``save_pretrained``.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(
        "diffusers' save_pretrained keeps no widths: a pruned network could not be loaded again. "
        "Save it by tdc_ray.models.saved_expert.save_expert, or a whole run by tdc-ray export."
    )

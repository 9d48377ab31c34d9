"""Weights that several networks have in common: once in memory, and once in a file."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def share_equal_weights(networks: Sequence[nn.Module]) -> None:
    """Make networks share the parameters that are equal, bit for bit, and of the same name."""
    known: dict[str, list[nn.Parameter]] = {}
    for network in networks:
        for name, parameter in list(network.named_parameters()):
            found = known.setdefault(name, [])
            if (same := _first_equal(found, parameter)) is None:
                found.append(parameter)
            else:
                module, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(module), leaf, found[same])


def packed_weights(networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Collect the weights of networks, those that are equal once.

    Returns:
        Tensors by ``0-1-3.conv_in.weight``: the networks that have it, by their places, and its
        name in them.
    """
    known: dict[str, list[tuple[Tensor, list[int]]]] = {}
    for index, network in enumerate(networks):
        for name, tensor in network.state_dict().items():
            found = known.setdefault(name, [])
            if (same := _first_equal([one for one, _ in found], tensor)) is None:
                found.append((tensor, [index]))
            else:
                found[same][1].append(index)
    return {
        f"{'-'.join(map(str, owners))}.{name}": tensor.contiguous()
        for name, found in known.items()
        for tensor, owners in found
    }


def unpacked_weights(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Return the state of each of ``count`` networks; they share what they have in common.

    Raises:
        ValueError: A name is malformed.
        IndexError: A tensor is of a network past the last.
    """
    states: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for key, tensor in tensors.items():
        owners, _, name = key.partition(".")
        for owner in owners.split("-"):
            states[int(owner)][name] = tensor
    return states


def _first_equal(tensors: Iterable[Tensor], wanted: Tensor) -> int | None:
    """Return the place of the first tensor that holds the same bits."""
    return next((i for i, tensor in enumerate(tensors) if _equal(tensor, wanted)), None)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    if (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride()):
        return True
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    """View a tensor as bytes: NaN equals itself, and 0 does not equal -0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

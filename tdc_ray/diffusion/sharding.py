"""FSDP2: the weights of a training, and so all that follows them, split over its ranks."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tdc_ray.config.train import Precision
from tdc_ray.execution.device import WorkerRank
from tdc_ray.models.precision import DTYPES
from tdc_ray.models.training_memory import is_sharding_unit


def sharding_mesh(worker: WorkerRank) -> DeviceMesh:
    """Return the mesh of all ranks of a training, on the kind of device that they compute on."""
    return init_device_mesh(worker.device.type, (worker.world_size,))


def shard(network: nn.Module, mesh: DeviceMesh, precision: Precision) -> nn.Module:
    """Split a network's weights over the ranks of a mesh; return its structure.

    Every rank calls it with the same weights, which may be on the CPU. From then on a block's are
    gathered, rounded to the precision, while it computes; gradients are summed in float32.

    Returns:
        A copy of the network as it was, its weights on the meta device.
    """
    memo = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad)
        for one in network.parameters()
    }
    structure = copy.deepcopy(network, memo)
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32)
    # The whole network's inputs are not rounded: timesteps are among them.
    of_all = replace(policy, cast_forward_inputs=False)
    for name, module in reversed(list(network.named_modules())):  # inner ones first
        if not name or is_sharding_unit(name):
            fully_shard(module, mesh=mesh, mp_policy=policy if name else of_all)
    return structure


def gathered(state: Any) -> Any:
    """Replace the shards in a nest of tensors: by whole tensors, on the CPU of the first rank.

    All ranks call it together; the others get None in place of each.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if state.device_mesh.get_rank() == 0 else None
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def shard_like(value: Tensor, like: Tensor | None) -> Tensor:
    """Copy this rank's part of a whole tensor if a sharded one has its shape, else all of it."""
    if not isinstance(like, DTensor) or like.shape != value.shape:
        return value.clone()
    # Without a source rank nothing is sent: every rank has the whole tensor.
    split = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like, requires_grad=False).copy_(split)

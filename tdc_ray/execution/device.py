"""The device that a worker computes on, and its rank among several workers."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True, slots=True)
class WorkerRank:
    """Rank of one of several data-parallel workers, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device


def configure_worker(num_threads: int, *, tf32: bool) -> None:
    """Prepare a worker's process: its threads, and how GPUs compute in fp32."""
    torch.set_num_threads(num_threads)
    allow_tf32(allowed=tf32)


def allow_tf32(*, allowed: bool) -> None:
    """Set whether GPUs round the inputs of fp32 products and convolutions to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute in full fp32 on GPUs within the context, whatever `configure_worker` set."""
    before = torch.backends.cuda.matmul.allow_tf32
    allow_tf32(allowed=False)
    try:
        yield
    finally:
        allow_tf32(allowed=before)


def worker_device() -> torch.device:
    """Return the GPU of this process, if it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def worker_rank() -> WorkerRank:
    """Return this process's rank among the workers of its item."""
    if not distributed.is_initialized():
        return WorkerRank(0, 1, worker_device())
    return WorkerRank(distributed.get_rank(), distributed.get_world_size(), worker_device())


def all_gather(value: int) -> list[int]:
    """Return the values of all workers of this process's item, in the order of ranks."""
    world_size = worker_rank().world_size
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    distributed.all_gather_object(values, value)
    return values

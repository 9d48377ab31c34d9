"""Several workers that run one item side by side, data parallel."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True, slots=True)
class Rank:
    """One of several workers of an item."""

    index: int
    """The first one is 0: it keeps checkpoints and the result."""

    count: int
    address: str
    """``HOST:PORT`` of the first one."""


@contextlib.contextmanager
def as_rank(rank: Rank) -> Iterator[None]:
    """Join the others: ``device.place`` gives this worker's place among them until the end."""
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{rank.address}",
        rank=rank.index,
        world_size=rank.count,
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()

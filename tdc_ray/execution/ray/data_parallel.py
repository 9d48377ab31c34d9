"""Several workers that run one item side by side, data parallel."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Longest wait for workers that are alive and silent; the pool ends the wait for dead ones."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Index of one of an item's workers, and the address at which the first one listens."""

    index: int
    count: int
    address: str
    """``HOST:PORT`` of the first one, whose index is 0."""


@contextlib.contextmanager
def as_rank(rank: Rank) -> Iterator[None]:
    """Join the process group; ``device.worker_rank`` returns this rank until the block ends.

    After an error the process cannot join another: leaving a group that failed may block, and
    torch then names the next one differently than other processes do, which wait for each other.
    """
    import torch  # the driver, which imports this, may do without
    from torch import distributed

    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{rank.address}",
        rank=rank.index,
        world_size=rank.count,
        timeout=COLLECTIVE_TIMEOUT,
    )
    yield
    distributed.destroy_process_group()

"""Several workers that run one item side by side, data parallel."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rank:
    """Index of one of an item's workers, and the address at which the first one listens."""

    index: int
    count: int
    address: str
    """``HOST:PORT`` of the first one, whose index is 0."""


@contextlib.contextmanager
def as_rank(rank: Rank) -> Iterator[None]:
    """Join the process group; ``device.worker_rank`` returns this rank until the block ends."""
    import torch  # the driver, which imports this, may do without
    from torch import distributed

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

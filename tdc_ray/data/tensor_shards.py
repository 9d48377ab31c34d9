"""Images, or latents, and their labels in shards of safetensors; read row by row, bit by bit."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tdc_ray.data.dataset import ImageBatch
from tdc_ray.storage.files import listing


def shard_path(folder: Path, first: int) -> Path:
    """Return the path of the shard that begins with an image."""
    return folder / f"{first:09d}.safetensors"


def missing_shards(folder: Path, count: int, size: int) -> list[int]:
    """Return the first image of every shard that is not there.

    Args:
        folder: Where the shards are.
        count: Images in all of them.
        size: Images of a shard; the last may have fewer.
    """
    shards = set(listing(folder, "*.safetensors"))
    return [first for first in range(0, count, size) if shard_path(folder, first) not in shards]


def read_rows(
    folder: Path, name: str, indices: Sequence[int], size: int, labels: str = "labels"
) -> ImageBatch:
    """Read some rows of a tensor ``(N, C, H, W)`` and of their labels.

    Args:
        folder: Where the shards are.
        name: Of the tensor.
        indices: Which rows, counted over all shards.
        size: Images of a shard.
        labels: Name of the tensor of labels: classes, ``(N,)``, or states of captions.
    """
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    for shard in {index // size for index in indices}:
        with safe_open(shard_path(folder, shard * size), framework="pt") as file:  # memory-mapped
            tensor, wanted = file.get_slice(name), file.get_slice(labels)
            for index in indices:
                if index // size == shard:
                    row = index % size
                    rows[index] = (tensor[row].clone(), wanted[row : row + 1].clone())
    parts, classes = zip(*(rows[index] for index in indices), strict=True)
    return ImageBatch(torch.stack(parts), torch.cat(classes))

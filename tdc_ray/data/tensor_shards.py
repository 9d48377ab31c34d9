"""Images, or latents, and their labels in shards of safetensors; read row by row, bit by bit."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tdc_ray.data.dataset import ImageBatch
from tdc_ray.models.labels import Captions
from tdc_ray.models.network_config import STATES
from tdc_ray.storage.files import listing

CLASSES = "labels"
"""Name of the tensor of images' classes."""


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
    folder: Path, name: str, indices: Sequence[int], size: int, labels: str = CLASSES
) -> ImageBatch:
    """Read some rows of a tensor ``(N, C, H, W)`` and of their labels.

    Args:
        folder: Where the shards are.
        name: Of the tensor.
        indices: Which rows, counted over all shards.
        size: Images of a shard.
        labels: Name of the labels: :data:`CLASSES`, ``(N,)``, or of captions (:func:`named`).
    """
    rows: dict[int, dict[str, Tensor]] = {}
    for shard in {index // size for index in indices}:
        with safe_open(shard_path(folder, shard * size), framework="pt") as file:  # memory-mapped
            keys = file.keys()
            wanted = [key for key in keys if key == name or key.partition(".")[0] == labels]
            columns = {key: file.get_slice(key) for key in wanted}
            for index in indices:
                if index // size == shard:
                    part = slice(index % size, index % size + 1)
                    rows[index] = {key: column[part].clone() for key, column in columns.items()}
    batch = {key: torch.cat([rows[index][key] for index in indices]) for key in rows[indices[0]]}
    return ImageBatch(batch[name], batch[CLASSES] if labels == CLASSES else unnamed(labels, batch))


def named(name: str, captions: Captions) -> dict[str, Tensor]:
    """Return the tensors of captions by their names in a file: states have the captions' own."""
    return {name if key == STATES else f"{name}.{key}": value for key, value in captions.items()}


def unnamed(name: str, tensors: Mapping[str, Tensor]) -> Captions:
    """Return the captions that :func:`named` named so."""
    keys = {key: key.partition(".")[2] or STATES for key in tensors}
    return {keys[key]: one for key, one in tensors.items() if key.partition(".")[0] == name}

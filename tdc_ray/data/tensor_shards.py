"""Images, or latents, and their labels in shards of safetensors; read row by row, bit by bit."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tdc_ray.data.dataset import ImageBatch
from tdc_ray.models.labels import Captions
from tdc_ray.models.network_config import STATES
from tdc_ray.storage.files import listing

CLASSES = "labels"
"""Name of the tensor of images' classes."""


_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
"""What safetensors calls types."""


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


def write_tensors(
    path: Path, whole: Mapping[str, Tensor], count: int, parts: Iterable[Mapping[str, Tensor]]
) -> None:
    """Write a file of safetensors, some of whose tensors come some rows at a time.

    So these need not fit into memory, as safetensors' own ``save_file`` asks for.

    Args:
        path: The file.
        whole: The tensors that come at once.
        count: Rows of the others, at least 1.
        parts: Rows of the others, in order.
    """
    places, start = dict[str, int](), 0
    with path.open("wb") as file:
        for part in parts:
            if not places:
                rows = {name: one[:1].expand(count, *one.shape[1:]) for name, one in part.items()}
                header, places = _header({**whole, **rows})
                file.write(header)
                for name, tensor in whole.items():
                    file.seek(places[name])
                    file.write(tensor.numpy().tobytes())
            for name, tensor in part.items():
                file.seek(places[name] + start * tensor[0].nbytes)
                file.write(tensor.numpy().tobytes())
            start += len(next(iter(part.values())))
    assert start == count


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return how a file of tensors begins, by their shapes and types, and where each will be."""
    entries, offsets, end = dict[str, Any](), dict[str, int](), 0
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # so all are aligned
        tensor, offsets[name] = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        kind, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def named(name: str, captions: Captions) -> dict[str, Tensor]:
    """Return the tensors of captions by their names in a file: states have the captions' own."""
    return {name if key == STATES else f"{name}.{key}": value for key, value in captions.items()}


def unnamed(name: str, tensors: Mapping[str, Tensor]) -> Captions:
    """Return the captions that :func:`named` named so."""
    keys = {key: key.partition(".")[2] or STATES for key in tensors}
    return {keys[key]: one for key, one in tensors.items() if key.partition(".")[0] == name}

"""One npz file, or all of a folder's (ImageNet-64's): in memory, or read when images are fetched.

What an npz file may hold, and how it is read, is in ``npz_files``.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ArrayImages, ImageDataset
from tdc_ray.data.pixels import resize_all
from tdc_ray.data.sources.encoded import warn_of_empty_classes
from tdc_ray.data.sources.npz_files import NpzFile, NpzImages, open_npz, unpack
from tdc_ray.data.sources.walk import is_hidden
from tdc_ray.data.sources.warn import warn_once
from tdc_ray.errors import CorruptFileError, DataError
from tdc_ray.storage.object_store import resolve_path

IN_MEMORY_BYTES = 2**28
"""npz files whose images take more than this, as they are or once brought to size, are not read
into memory."""

File = TypeVar("File")
Read = TypeVar("Read")

logger = logging.getLogger(__name__)


def open(config: DataConfig) -> ImageDataset:
    """Open one file, or all of a folder's in the order of their numbers (ImageNet-64's).

    Raises:
        DataError: There is no image, the files do not go together, or too many are corrupt.
    """
    assert config.path is not None  # DataConfig's own rule
    path = Path(config.path)
    paths = npz_paths(path)
    readable = _Readable(len(paths), config.max_corrupt)
    files = readable(open_npz, paths)
    for file in files:
        if file.image_shape != files[0].image_shape:
            raise DataError(
                f"images in {file.path} must have shape {files[0].image_shape}, like those in "
                f"{files[0].path}, got {file.image_shape}."
            )
    files = [file for file in files if len(file)]
    if not files:
        raise DataError(f"data.path {path} holds no image.")
    count, resized = sum(len(file) for file in files), math.prod(config.shape)
    if count * max(math.prod(files[0].image_shape), resized) > IN_MEMORY_BYTES:
        cache_dir = resolve_path(config.cache_dir)
        unpacked = readable(lambda file: unpack(file, cache_dir), files)
        return NpzImages(unpacked, _labels(path, [file.npz for file in unpacked]), config)
    read = readable(lambda file: (file, resize_all(file.read(), config, file.to_tensor)), files)
    images = torch.cat([images for _, images in read])
    return ArrayImages(images, _labels(path, [file for file, _ in read]))


def npz_paths(path: Path) -> list[Path]:
    """Return a file's own path, or a folder's files in the order of their numbers.

    Raises:
        DataError: The folder holds none.
    """
    paths = npz_in(path) if path.is_dir() else [path]
    if not paths:
        raise DataError(f"data.path {path} holds no .npz file.")
    return paths


def npz_in(folder: Path) -> list[Path]:
    """Return the npz files of a folder in the order of their numbers.

    What a run's evaluation writes beside its images, their features and moments, is left out.
    """
    paths = [path for path in folder.iterdir() if path.suffix.lower() == ".npz"]
    stems = {path.stem for path in paths}
    beside = {stem + end for stem in stems for end in (".features", ".moments")}
    images = (path for path in paths if path.stem not in beside and not is_hidden(path.name))
    return sorted(images, key=_natural)


class _Readable:
    """Processes npz files one by one; up to a limit, corrupt ones are left out."""

    def __init__(self, num_files: int, max_corrupt: int) -> None:
        self.num_files, self.max_corrupt = num_files, max_corrupt
        self.reasons: list[str] = []

    def __call__(self, function: Callable[[File], Read], files: Sequence[File]) -> list[Read]:
        results = []
        for file in files:
            try:
                results.append(function(file))
            except CorruptFileError as error:
                if self.num_files == 1:
                    raise
                self.reasons.append(str(error))
                if len(self.reasons) > min(self.max_corrupt, self.num_files - 1):
                    none_left = len(self.reasons) == self.num_files
                    way_out = "" if none_left else ", or raise --data.max-corrupt"
                    raise CorruptFileError(
                        f"{len(self.reasons)} of {self.num_files} npz files are corrupt, and "
                        f"data.max_corrupt, which counts files, is {self.max_corrupt}: "
                        f"{' '.join(self.reasons)} Mend or remove them{way_out}."
                    ) from error
                logger.warning("%s Its images are left out.", error)
        return results


def _labels(path: Path, files: Sequence[NpzFile]) -> Tensor | None:
    """Join the files' labels; None where an image has none."""
    known = [file.labels for file in files if file.labels is not None]
    if len(known) < len(files):
        if known:
            warn_once(f"labels of {path} are left out: some of its files have none")
        return None
    joined = np.concatenate(known)
    if missing := int((joined < 0).sum()):  # by convention, images without a label have -1
        warn_once(f"labels of {path} are left out: {missing} of {len(joined)} are below 0")
        return None
    labels = torch.from_numpy(joined)
    warn_of_empty_classes(labels, int(labels.max()) + 1, path)
    return labels


def _natural(path: Path) -> tuple[int, str]:
    """Return a key that sorts ``batch_10`` behind ``batch_9``."""
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits or 0), path.name)

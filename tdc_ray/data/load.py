"""Datasets: digits, npz files, image folders and CIFAR-10, brought to one size."""

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.data.pixels import channels_first, to_size
from tdc_ray.data.sources.folder import FolderImages
from tdc_ray.data.sources.npz_files import NpzFile, NpzImages, open_npz, unpack
from tdc_ray.errors import CorruptFileError, DataError

IN_MEMORY_BYTES = 2**28
"""npz files whose images take more than this, as they are or once brought to size, are not read
into memory."""

File = TypeVar("File")
Found = TypeVar("Found")

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""uint8 images, or float32 latents, ``(B, C, H, W)``, and int64 labels ``(B,)``, -1 where there
are none."""


class ImageDataset(Protocol):
    """Images that can be fetched by their numbers."""

    num_classes: int | None
    """Number of classes of the labels; None where there are no labels, or not for all images."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Fetch a batch; torch's DataLoader calls this with all indices at once."""
        ...

    def fingerprint(self) -> str:
        """Name the content: equal content gives an equal name."""
        ...


class ArrayImages:
    """Images held in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        """Take uint8 images ``(N, C, H, W)`` and int64 labels ``(N,)``."""
        self.images = images
        self.num_classes = None if labels is None else int(labels.max()) + 1
        self.labels = torch.full((len(images),), -1) if labels is None else labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]

    def fingerprint(self) -> str:
        """Hash shape, pixels and labels."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=1)  # a worker does many items on the same data
def load_dataset(config: DataConfig) -> ImageDataset:
    """Open a dataset, with every image at the size and number of channels asked for.

    Raises:
        DataError: It is missing, malformed, or empty, or too many of its files are corrupt.
    """
    if config.source == "digits":
        return _digits(config)
    assert config.path is not None  # DataConfig's own rule
    path = Path(config.path)
    if not path.exists():
        raise DataError(
            f"data.path {path} does not exist (data.source {config.source}). "
            "Set --data.path to where the images are."
        )
    if config.source == "folder":
        return _folder(path, config)
    if config.source == "cifar10":
        return _cifar10(path, config)
    return _npz(path, config)


def _digits(config: DataConfig) -> ArrayImages:
    from sklearn.datasets import load_digits  # a second's import that other sources do not need

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    return ArrayImages(_sized(pixels, config), torch.from_numpy(digits.target))


def _folder(path: Path, config: DataConfig) -> FolderImages:
    if not path.is_dir():
        raise DataError(f"data.path {path} must be a folder of images (data.source folder).")
    images = FolderImages(path, config)
    images.__getitems__([0])  # one must be readable, before any work starts
    return images


def _cifar10(path: Path, config: DataConfig) -> ArrayImages:
    from torchvision.datasets import CIFAR10

    try:  # the files are pickles: torchvision checks their MD5 before it opens them
        cifar = CIFAR10(str(path), train=True, download=False)
    except RuntimeError as error:
        raise DataError(
            f"data.path {path} holds no CIFAR-10: expected {path}/cifar-10-batches-py as "
            f"torchvision unpacks it. {error}"
        ) from error
    return ArrayImages(_sized(cifar.data, config), torch.tensor(cifar.targets))


def _npz(path: Path, config: DataConfig) -> ImageDataset:
    """One file, or all of a folder's files in the order of their numbers (ImageNet-64)."""
    paths = sorted(path.glob("*.npz"), key=_natural) if path.is_dir() else [path]
    if not paths:
        raise DataError(f"data.path {path} holds no .npz file.")
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
    count, wanted = sum(len(file) for file in files), config.num_channels * config.image_size**2
    if count * max(math.prod(files[0].image_shape), wanted) > IN_MEMORY_BYTES:
        cache_dir = Path(config.cache_dir).expanduser()
        unpacked = readable(lambda file: unpack(file, cache_dir), files)
        return NpzImages(unpacked, _labels(path, [file.npz for file in unpacked]), config)
    read = readable(lambda file: (file, _sized(file.read(), config, file.to_tensor)), files)
    images = torch.cat([images for _, images in read])
    return ArrayImages(images, _labels(path, [file for file, _ in read]))


class _Readable:
    """Does something with each of several npz files; up to a limit, corrupt ones are left out."""

    def __init__(self, num_files: int, max_corrupt: int) -> None:
        self.num_files, self.max_corrupt = num_files, max_corrupt
        self.reasons: list[str] = []

    def __call__(self, function: Callable[[File], Found], files: Sequence[File]) -> list[Found]:
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
    labels = [file.labels for file in files if file.labels is not None]
    if len(labels) < len(files):
        if labels:
            logger.warning("labels of %s are left out: some of its files have none", path)
        return None
    together = np.concatenate(labels)
    if missing := int((together < 0).sum()):  # by convention, images without a label have -1
        total = len(together)
        logger.warning("labels of %s are left out: %d of %d are below 0", path, missing, total)
        return None
    return torch.from_numpy(together)


def _natural(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits or 0), path.name)


def _sized(
    pixels: NDArray[np.uint8],
    config: DataConfig,
    to_tensor: Callable[[NDArray[np.uint8]], Tensor] = channels_first,
) -> Tensor:
    """Bring all images to size, some at a time."""
    starts = range(0, len(pixels), 4096)
    return torch.cat(
        [to_size(to_tensor(pixels[start : start + 4096]), config) for start in starts]
    )

"""Datasets: digits, npz files, image folders and CIFAR-10, brought to one size."""

import functools
import hashlib
import logging
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from tdc_ray.errors import DataError
from tdc_ray.settings import DataConfig

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""Share of red, green and blue in grey (ITU-R BT.601, as in PIL)."""

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""uint8 images, or float32 latents, ``(B, C, H, W)``, and int64 labels ``(B,)``, -1 where there
are none."""


class ImageDataset(Protocol):
    """Images that can be fetched by their numbers."""

    num_classes: int | None
    """Number of classes of the labels; None where there are no labels."""

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


class FolderImages:
    """Image files, decoded when they are asked for; none of them has a label."""

    num_classes: int | None = None

    def __init__(self, paths: Sequence[Path], config: DataConfig) -> None:
        self.paths = list(paths)
        self.config = config

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [self._decode(self.paths[index]) for index in indices]
        return torch.stack(images), torch.full((len(images),), -1)

    def fingerprint(self) -> str:
        """Hash the files' places, sizes and times, and the shape they are brought to."""
        digest = hashlib.sha256(f"{self.config.image_size} {self.config.num_channels}".encode())
        for path in self.paths:
            found = path.stat()
            digest.update(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _decode(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB" if self.config.num_channels == 3 else "L"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path} is no readable image: {error}. Mend or remove it.") from error
        return _to_size(_channels_first(pixels[None]), self.config)[0]


@functools.lru_cache(maxsize=1)  # a worker does many items on the same data
def load_dataset(config: DataConfig) -> ImageDataset:
    """Open a dataset, with every image at the size and number of channels asked for.

    Raises:
        DataError: It is missing, malformed, or empty.
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
    return _array_images(pixels[..., None], digits.target, config)


def _folder(path: Path, config: DataConfig) -> FolderImages:
    if not path.is_dir():
        raise DataError(f"data.path {path} must be a folder of images (data.source folder).")
    paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(
            f"data.path {path} holds no image; looked for {', '.join(IMAGE_SUFFIXES)}."
        )
    images = FolderImages(paths, config)
    images.__getitems__([0])  # the first one must be readable, before any work starts
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
    return _array_images(cifar.data, np.asarray(cifar.targets), config)


def _npz(path: Path, config: DataConfig) -> ArrayImages:
    """One file, or all of a folder's files in the order of their numbers (ImageNet-64)."""
    files = sorted(path.glob("*.npz"), key=_natural) if path.is_dir() else [path]
    if not files:
        raise DataError(f"data.path {path} holds no .npz file.")
    read = [_read_npz(file) for file in files]
    for file, (pixels, _) in zip(files, read, strict=True):
        if pixels.shape[1:] != read[0][0].shape[1:]:
            raise DataError(
                f"images in {file} must have shape {read[0][0].shape[1:]}, like those in "
                f"{files[0]}, got {pixels.shape[1:]}."
            )
    images = np.concatenate([pixels for pixels, _ in read])
    labels = [labels for _, labels in read if labels is not None]
    if labels and len(labels) < len(read):
        logger.warning("labels of %s are left out: some of its files have none", path)
    return _array_images(
        images, np.concatenate(labels) if len(labels) == len(read) else None, config
    )


def _natural(path: Path) -> tuple[int, str]:
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits or 0), path.name)


def _read_npz(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Read images ``(N, H, W, C)`` and labels ``(N,)``."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            key = next((key for key in ("images", "arr_0", "data") if key in file), None)
            if key is None:
                raise DataError(
                    f"{path} must hold images, arr_0 or data; it holds {', '.join(file.files)}."
                )
            images = file[key]
            label_key = next((name for name in ("labels", "arr_1") if name in file), None)
            labels = None if label_key is None else file[label_key]
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is no readable npz file: {error}") from error
    if key == "data":  # ImageNet-64: rows of 3 x H x W, labels from 1
        images = _unflatten(images, path)
        labels = None if labels is None else labels - 1
    if images.dtype != np.uint8:
        raise DataError(f"{key} in {path} must be uint8, got {images.dtype}.")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(
            f"{key} in {path} must have shape (N, H, W) or (N, H, W, 1 or 3), got {images.shape}."
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise DataError(
            f"labels in {path} must have shape {images.shape[:1]}, got {labels.shape}."
        )
    return images, None if labels is None else labels.astype(np.int64)


def _unflatten(rows: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    size = round((rows.shape[1] / 3) ** 0.5) if rows.ndim == 2 else 0
    if rows.ndim != 2 or rows.shape[1] != 3 * size * size:
        raise DataError(f"data in {path} must have shape (N, 3 * H * H), got {rows.shape}.")
    return rows.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)  # (N, 3HH) -> (N, H, H, 3)


def _array_images(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None, config: DataConfig
) -> ArrayImages:
    if len(pixels) == 0:
        raise DataError(f"data.path {config.path} holds no image.")
    chunks = [
        _to_size(_channels_first(pixels[start : start + 4096]), config)
        for start in range(0, len(pixels), 4096)
    ]
    return ArrayImages(torch.cat(chunks), None if labels is None else torch.from_numpy(labels))


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """Turn ``(N, H, W)`` or ``(N, H, W, C)`` into ``(N, C, H, W)``."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def _to_size(images: Tensor, config: DataConfig) -> Tensor:
    """Bring uint8 images to the size (shorter side, then a square from the middle) and colours."""
    channels, size = images.shape[1], config.image_size
    if channels == 3 and config.num_channels == 1:
        weights = torch.tensor(GREY_WEIGHTS)[:, None, None]
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    elif channels == 1 and config.num_channels == 3:
        images = images.expand(-1, 3, -1, -1).contiguous()
    if images.shape[-2:] != (size, size):
        bicubic = transforms.InterpolationMode.BICUBIC
        images = transforms.resize(images, [size], interpolation=bicubic, antialias=True)
        images = transforms.center_crop(images, [size, size])
    return images

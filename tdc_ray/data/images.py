"""Images in memory, or of a data set of torch's: written once, as a source like others (npz).

Work items carry where images are, and not the images, so that they run in any process.
"""

import hashlib
import logging
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from tdc_ray.config.data import DataConfig
from tdc_ray.data.detect import data_config
from tdc_ray.data.sources.image_file import GREY_MODES, shown_pixels
from tdc_ray.data.sources.npz_labels import check_type, class_numbers
from tdc_ray.errors import DataError
from tdc_ray.storage.object_store import temporary_path

IMAGE_KEYS = ("image", "img", "input", "pixel_values")
"""Where elements of a data set that are mappings have their image, in the order of search."""

TOLERANCE = 1e-4
"""How far floating-point images may leave their range, as a share of it: rounding does."""

PLAIN_MODES = ("L", "RGB", "LA", "RGBA", "F")
"""Pillow's names of images whose numbers are taken as those of an array are."""

Pixels = NDArray[np.uint8]
"""An image, ``(H, W, C)``."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class Images:
    """Images of a tensor, an array, or a data set, with what these do not say of themselves."""

    images: Any = field(repr=False)
    """A tensor ``(N, C, H, W)``, an array ``(N, H, W, C)`` or ``(N, H, W)``, or a data set with a
    length, whose elements are such images without the N, or Pillow's: alone, or first in a tuple,
    before an int label, or in a mapping under ``image``, beside ``label``. Every element is read
    once, so what it draws at random stays as drawn."""

    labels: Any = field(default=None, repr=False)
    """Classes of the images, whole numbers from 0, ``(N,)``, ``(N, 1)`` or one-hot; None means
    those of a data set, if all its images have one."""

    value_range: tuple[float, float] | None = None
    """Black and white in floating-point images, such as (-1, 1) or (0, 1); they are rounded to 8
    bits. None means that there are none: uint8 images have 0 and 255."""

    def __post_init__(self) -> None:
        if self.value_range is not None and self.value_range[0] == self.value_range[1]:
            raise DataError(f"value_range must be two different numbers, got {self.value_range}.")

    def save(self, folder: Path, shape: tuple[int, int, int]) -> Path:
        """Write the images as an npz file that is named by its content; return its path.

        Args:
            folder: Where to.
            shape: ``(C, H, W)`` that every image must have.

        Raises:
            DataError: An image has another shape, or is of an unknown kind, or there is none.
        """
        source = self.images.cpu() if isinstance(self.images, Tensor) else self.images
        _check_kind(source)
        channels, height, width = shape
        stored = (len(source), height, width, channels)
        labels, num_labels, digest = list[int](), 0, hashlib.sha256(str(stored).encode())
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(folder / "images.npz")
        try:
            with zipfile.ZipFile(temporary, "w") as archive:
                with archive.open("images.npy", "w", force_zip64=True) as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": stored}
                    npy.write_array_header_1_0(file, header)
                    for image, label in map(_parts, _elements(source)):
                        content = self._pixels(image, stored[1:]).tobytes()
                        file.write(content)
                        digest.update(content)
                        num_labels += label is not None
                        labels += [int(label)] if isinstance(label, int | np.integer) else []
                if self.labels is None and num_labels and len(labels) < len(source):
                    logger.warning(
                        "labels of the images are left out: %d of %d have none, or one that is no "
                        "whole number",
                        len(source) - len(labels),
                        len(source),
                    )
                classes = self._classes(labels, len(source))
                if classes is not None:
                    digest.update(classes.tobytes())
                    with archive.open("labels.npy", "w") as file:
                        npy.write_array(file, classes)
            return temporary.replace(folder / f"images-{digest.hexdigest()[:16]}.npz")
        finally:
            temporary.unlink(missing_ok=True)

    def _pixels(self, image: Any, shape: tuple[int, ...]) -> Pixels:
        """Convert one image to uint8, ``(H, W, C)``."""
        if isinstance(image, Image.Image):
            image = _pillows(image)
        if isinstance(image, Tensor):
            image = image.detach().cpu()
            image = image.float() if image.dtype == torch.bfloat16 else image  # NumPy has none
            image = (image.movedim(0, -1) if image.ndim == 3 else image).numpy()
        if not isinstance(image, np.ndarray):
            raise DataError(
                "images must be tensors, arrays, or Pillow's, got a "
                f"{type(image).__name__}: give a data set whose elements are such."
            )
        image = image[..., None] if image.ndim == 2 else image
        if image.shape != shape:
            raise DataError(
                f"images must be (H, W, C) = {shape} for this base, which of a tensor is (C, H, "
                f"W), got {image.shape}: resize, convert or permute them, or name a path, whose "
                "images are brought to size."
            )
        if image.dtype == np.uint8:
            return np.asarray(image)
        if not np.issubdtype(image.dtype, np.floating):
            raise DataError(f"images must be uint8 or floating-point, got {image.dtype}.")
        if self.value_range is None:
            raise DataError(
                f"images must be uint8, or say what black and white are, got {image.dtype}: give "
                "tdc_ray.Images(images, value_range=(-1, 1)), or (0, 1)."
            )
        low, high = self.value_range
        share = (image.astype(np.float64) - low) / (high - low)
        if not (share.min() >= -TOLERANCE and share.max() <= 1 + TOLERANCE):  # NaN, too
            raise DataError(
                f"images must lie in value_range ({low}, {high}), got {image.min()} to "
                f"{image.max()}."
            )
        pixels: Pixels = np.round(255 * share).clip(0, 255).astype(np.uint8)
        return pixels

    def _classes(self, found: list[int], count: int) -> NDArray[np.int64] | None:
        """Return the labels of all images; None where one has none."""
        if self.labels is None:
            return np.asarray(found, dtype=np.int64) if len(found) == count else None
        labels = np.asarray(self.labels)
        check_type(labels.dtype, "tdc_ray.Images")
        return class_numbers(labels, count, "tdc_ray.Images")


def images_config(images: Any, data: DataConfig, folder: Path, *, classes: bool) -> DataConfig:
    """Return the settings of the data that a caller of the Python API gives.

    Args:
        images: :class:`Images` or what these wrap, or a path, or the name of a bundled source.
        data: Size and channels that images have, or are brought to if a path is named; whatever
            else is set stays.
        folder: Where images without a path are written.
        classes: Whether subfolders of a folder of images are classes.

    Raises:
        ConfigError: The path holds no data of a known kind.
        DataError: Images are of another kind, shape or range.
    """
    if isinstance(images, str | Path):
        named = data_config(str(images), data, "images")
        by_folders = classes and named.source == "folder"
        return replace(named, labels_from_folders=named.labels_from_folders or by_folders)
    images = images if isinstance(images, Images) else Images(images)
    path = images.save(folder, data.shape)
    return replace(data, source="npz", path=str(path), labels_from_folders=False)


def _check_kind(source: Any) -> None:
    """Refuse what has no length, or too few or too many dimensions."""
    is_array = isinstance(source, Tensor | np.ndarray)
    if is_array and source.ndim not in ((4,) if isinstance(source, Tensor) else (3, 4)):
        raise DataError(
            "images must be a tensor (N, C, H, W) or an array (N, H, W, C) or (N, H, W), got "
            f"shape {tuple(source.shape)}."
        )
    has_length = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if isinstance(source, IterableDataset | Mapping) or not has_length:
        raise DataError(
            "images must be a tensor, an array, a path, or a data set with a length, got a "
            f"{type(source).__name__}."
        )
    if not len(source):
        raise DataError("images must be at least one, got none.")


def _elements(source: Any) -> Iterator[Any]:
    return (source[index] for index in range(len(source)))


def _pillows(image: Image.Image) -> NDArray[Any]:
    """Return a Pillow image's numbers; those of a palette, or such, as the colours they stand for.

    Raises:
        DataError: It has grey values whose white is unknown.
    """
    if image.mode in PLAIN_MODES:
        return np.asarray(image)
    channels = 1 if image.mode in GREY_MODES else 3
    return shown_pixels(image, channels, f"an image of Pillow's mode {image.mode}")


def _parts(element: Any) -> tuple[Any, Any]:
    """Split an element of a data set into its image and its label; None where it has none."""
    label = None
    if isinstance(element, Mapping):
        key = next((key for key in IMAGE_KEYS if key in element), None)
        if key is None:
            raise DataError(
                f"elements of the data set must have one of {', '.join(IMAGE_KEYS)}, got "
                f"{', '.join(map(str, element))}."
            )
        element, label = element[key], element.get("label")
    elif isinstance(element, tuple | list) and element:
        element, label = element[0], element[1] if len(element) > 1 else None
    if isinstance(label, Tensor) and label.ndim == 0:
        label = label.item()
    return element, label

"""The image files below a folder, decoded when they are asked for."""

import hashlib
import logging
import multiprocessing
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ImageBatch
from tdc_ray.data.pixels import channels_first, to_size
from tdc_ray.errors import CorruptFileError, DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

MAX_NAMED = 20
"""Most corrupt files that an error names; the log has named every one of them."""

_UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files, for others than images, and for decompression bombs."""

_GREY = ("1", "L", "LA", "La", "I", "I;16", "F")
"""Pillow's names of what has no colours."""

logger = logging.getLogger(__name__)


def open(config: DataConfig) -> "FolderImages":
    """List the image files below the path.

    Raises:
        DataError: There is none, one lies in no class, or none can be decoded.
    """
    assert config.path is not None  # DataConfig's own rule
    path = Path(config.path)
    if not path.is_dir():
        raise DataError(f"data.path {path} must be a folder of images (data.source folder).")
    images = FolderImages(path, config)
    images.__getitems__([0])  # one must be readable, before any work starts
    return images


def stored_shape(path: Path) -> tuple[int, int, int]:
    """Decode an image file and return its ``(C, H, W)``: one channel for grey, else three.

    Raises:
        CorruptFileError: It is no readable image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return (1 if image.mode in _GREY else 3, image.height, image.width)
    except _UNREADABLE as error:
        raise CorruptFileError(f"{path} is no readable image: {error}.") from error


class FolderImages:
    """Image files in the order of their paths; in place of one that is corrupt comes the next.

    The paths are kept as one byte string: a list of a million of them would take ten times the
    memory, and that again in every loader process.
    """

    def __init__(self, root: Path, config: DataConfig) -> None:
        """List the files, without opening one.

        Raises:
            DataError: There is none, a folder cannot be listed, or an image lies in no class.
        """
        self.root, self.config = root, config
        self._paths, self._ends, labels = bytearray(), array("q"), array("q")
        classes: list[str] = []
        for path in _image_paths(root):
            self._paths += os.fsencode(path)
            self._ends.append(len(self._paths))
            if config.labels_from_folders:
                folder, below, _ = path.partition("/")
                if not below:
                    raise DataError(
                        f"{root / path} must lie in a subfolder, its class, for "
                        "data.labels_from_folders. Move it into one, or leave the setting off."
                    )
                if classes[-1:] != [folder]:
                    classes.append(folder)
            labels.append(len(classes) - 1)  # -1: none
        if not self._ends:
            raise DataError(
                f"data.path {root} holds no image; looked for {', '.join(IMAGE_SUFFIXES)}."
            )
        self.num_classes = len(classes) or None
        self.labels = torch.frombuffer(labels, dtype=torch.int64)
        # How many files are known to be corrupt, then their indices: shared with loader processes.
        self._corrupt = multiprocessing.Array("q", 1 + min(config.max_corrupt, len(self)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        images, read = zip(*(self._readable(index) for index in indices), strict=True)
        return ImageBatch(torch.stack(images), self.labels[list(read)])

    def fingerprint(self) -> str:
        """Hash the files' places, sizes and times, the shape they are brought to, and labels."""
        labelled = " labels" if self.config.labels_from_folders else ""
        shape = f"{self.config.image_size} {self.config.num_channels}{labelled}"
        digest, root = hashlib.sha256(shape.encode()), self.root.resolve()
        for index in range(len(self)):
            path = root / self.path(index)
            stat = path.stat()
            digest.update(os.fsencode(f"{path} {stat.st_size} {stat.st_mtime_ns}\n"))
        return digest.hexdigest()[:16]

    def path(self, index: int) -> str:
        """Return an image's path, relative to the folder."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._paths[start : self._ends[index]]))

    def _readable(self, index: int) -> tuple[Tensor, int]:
        """Decode an image, or the first one after it that can be; return it and its index."""
        reason = ""
        for position in range(index, index + len(self)):
            candidate = position % len(self)
            try:
                return self._decode(self.root / self.path(candidate)), candidate
            except CorruptFileError as error:
                reason = str(error)
                self._leave_out(candidate, reason)
        raise CorruptFileError(f"{reason} No image in {self.root} can be. Mend or replace them.")

    def _leave_out(self, index: int, reason: str) -> None:
        """Log a corrupt file once.

        Raises:
            CorruptFileError: It is one more than ``data.max_corrupt``.
        """
        limit = self.config.max_corrupt
        with self._corrupt.get_lock():
            count = self._corrupt[0]
            corrupt = [*self._corrupt[1 : 1 + count]]
            if index in corrupt:
                return
            if count < limit:
                self._corrupt[1 + count] = index
                self._corrupt[0] += 1
                logger.warning("%s The next image takes its place.", reason)
                return
        names = [self.path(other) for other in [*corrupt[: MAX_NAMED - 1], index]]
        raise CorruptFileError(
            f"{reason} With it {count + 1} of the files in {self.root} are corrupt, and "
            f"data.max_corrupt is {limit}: {', '.join(names)}. Mend or remove them, or raise "
            "--data.max-corrupt."
        )

    def _decode(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB" if self.config.num_channels == 3 else "L"))
        except _UNREADABLE as error:
            if isinstance(error, OSError) and error.errno is not None:  # it was not even read
                raise DataError(f"{path} cannot be opened: {error}. Mend or remove it.") from error
            raise CorruptFileError(f"{path} is no readable image: {error}.") from error
        return to_size(channels_first(pixels[None]), self.config)[0]


def _image_paths(root: Path, folder: str = "") -> Iterator[str]:
    """Yield the images' paths below ``root``, relative to it, in the order of their parts."""
    try:
        with os.scandir(root / folder) as scan:
            entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan)
    except OSError as error:
        raise DataError(f"data.path {root} cannot be listed: {error}.") from error
    for name, is_folder in entries:
        if is_folder:
            yield from _image_paths(root, f"{folder}{name}/")
        elif Path(name).suffix.lower() in IMAGE_SUFFIXES:
            yield f"{folder}{name}"

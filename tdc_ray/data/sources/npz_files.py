"""npz files of images: read whole, or image by image where they are too large for memory.

Images are read from the file itself, or, if they are compressed, from a plain ``.npy`` file in the
cache. They are not mapped into memory: what was touched of a mapped file counts as the process's
memory, and one that is truncated, or lost with its server, ends the process by a signal.
"""

import errno
import hashlib
import logging
import math
import os
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ImageBatch
from tdc_ray.data.pixels import channels_first, to_size
from tdc_ray.data.sources.npz_labels import check_type, class_numbers
from tdc_ray.data.sources.warn import warn_once
from tdc_ray.errors import CorruptFileError, DataError
from tdc_ray.storage.digest import json_digest
from tdc_ray.storage.files import atomic_path, locked

LABELS_OF: Mapping[str, tuple[str, ...]] = {
    "images": ("labels", "arr_1"),
    "arr_0": ("labels", "arr_1"),
    "data": ("labels", "arr_1"),
    "x_train": ("y_train",),
    "train_images": ("train_labels",),
}
"""Names of arrays of images, and of their labels: NumPy's own, ImageNet-64's, Keras', MedMNIST's.
Of the last two the images to train on are taken."""

TRAINING_IMAGES = ("x_train", "train_images")
"""Names that tell them from other images in the file."""

BLOCK_BYTES = 2**20
"""How much of a file is unpacked at once."""

logger = logging.getLogger(__name__)

_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile and NumPy raise for files that are damaged, or hold something else than arrays."""


@dataclass(frozen=True, slots=True)
class NpzFile:
    """What an npz file says of its images, and their labels."""

    path: Path
    member: zipfile.ZipInfo
    """The images' npy file within it."""

    header_bytes: int
    """The size of the npy header before the pixels."""

    stored_shape: tuple[int, ...]
    """``(N, H, W, C)``; of ImageNet-64's rows ``(N, C, H, W)``."""

    channels_first: bool

    fortran_order: bool
    """The bytes of one image are scattered, as the npy format allows."""

    labels: NDArray[np.int64] | None
    """``(N,)``"""

    def __len__(self) -> int:
        return self.stored_shape[0]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``(H, W, C)``."""
        shape = self.stored_shape[1:]
        return (*shape[1:], shape[0]) if self.channels_first else shape

    def read(self) -> NDArray[np.uint8]:
        """Read all images, in ``stored_shape``.

        Raises:
            CorruptFileError: The pixels are damaged.
        """
        with _opened(self.path) as archive, archive.open(self.member) as file:
            pixels: NDArray[np.uint8] = npy.read_array(file, allow_pickle=False)
        return pixels.reshape(self.stored_shape)

    def to_tensor(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Turn images as they are stored into ``(B, C, H, W)``."""
        return torch.from_numpy(pixels) if self.channels_first else channels_first(pixels)


@dataclass(frozen=True, slots=True)
class UnpackedNpz:
    """An npz file whose pixels lie uncompressed somewhere."""

    npz: NpzFile
    path: Path
    offset: int
    """Where the first image starts in the file at ``path``, in bytes."""

    def read(self, indices: NDArray[np.int64]) -> Tensor:
        """Read some of the images, ``(B, C, H, W)``.

        Raises:
            DataError: The file is gone, or ends early.
        """
        pixels = np.empty((len(indices), *self.npz.stored_shape[1:]), np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                for i in np.argsort(indices):
                    offset = self.offset + int(indices[i]) * pixels[i].nbytes
                    if os.preadv(file.fileno(), [pixels[i]], offset) != pixels[i].nbytes:
                        raise DataError(f"{self.path} has been cut short. Start again.")
        except OSError as error:
            raise DataError(f"{self.path} can no longer be read: {error}. Start again.") from error
        return self.npz.to_tensor(pixels)


class NpzImages:
    """Images that are read from npz files when they are asked for."""

    def __init__(
        self, files: Sequence[UnpackedNpz], labels: Tensor | None, config: DataConfig
    ) -> None:
        """Wrap the files, and int64 labels ``(N,)``."""
        self.files, self.config = list(files), config
        self.ends = np.cumsum([len(file.npz) for file in files])
        self.num_classes = None if labels is None else int(labels.max()) + 1
        self.labels = torch.full((len(self),), -1) if labels is None else labels

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        chosen, config = np.asarray(indices), self.config
        images = torch.empty((len(chosen), *config.shape), dtype=torch.uint8)
        of_file = np.searchsorted(self.ends, chosen, side="right")
        for number in np.unique(of_file):
            file, rows = self.files[number], np.flatnonzero(of_file == number)
            first = self.ends[number] - len(file.npz)
            images[rows] = to_size(file.read(chosen[rows] - first), config)
        return ImageBatch(images, self.labels[chosen])

    def fingerprint(self) -> str:
        """Hash the pixels' checksums, the labels, and the shape that images are brought to."""
        digest = hashlib.sha256(f"{self.config.image_size} {self.config.num_channels}".encode())
        for file in self.files:
            digest.update(f"{file.npz.stored_shape} {file.npz.member.CRC}\n".encode())
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()[:16]


def open_npz(path: Path) -> NpzFile:
    """Read all of an npz file but the pixels.

    Raises:
        CorruptFileError: It is damaged, or holds no images.
        DataError: Its arrays are not of the types and shapes of images and labels.
    """
    with _opened(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        key = next((key for key in LABELS_OF if key in members), None)
        if key is None:
            raise CorruptFileError(
                f"{path} must hold images in one of {', '.join(LABELS_OF)}; it holds "
                f"{', '.join(members)}. Save them by numpy.savez(path, images=..., labels=...)."
            )
        if key in TRAINING_IMAGES:
            warn_once(f"{path}: the images of {key} are taken, and no others")
        with archive.open(members[key]) as file:
            shape, fortran_order, dtype = _read_header(file)
            header_bytes = file.tell()
        if dtype != np.uint8:
            raise DataError(f"{key} in {path} must be uint8, got {dtype}. {_to_uint8(dtype)}")
        is_rows = key == "data"  # ImageNet-64
        stored_shape = _row_shape(shape, path) if is_rows else _image_shape(shape, key, path)
        if header_bytes + math.prod(shape) != members[key].file_size:
            raise ValueError(f"{key} has not the size of shape {shape}")
        label_key = next((key for key in LABELS_OF[key] if key in members), None)
        labels = None
        if label_key is not None:
            labels = _read_labels(archive, members[label_key], shape[0], path)
            if is_rows:
                labels -= 1  # ImageNet-64 counts from 1
    return NpzFile(path, members[key], header_bytes, stored_shape, is_rows, fortran_order, labels)


def unpack(npz: NpzFile, cache_dir: Path) -> UnpackedNpz:
    """Check the pixels, and copy them into the cache if they are compressed; both only once.

    Later calls, of other processes too, see by a file in the cache that it is done.

    Raises:
        CorruptFileError: The pixels are damaged.
        DataError: They cannot be read one by one, or the cache cannot take them.
    """
    if npz.fortran_order:
        raise DataError(
            f"{npz.path} is too large for memory and holds its images in Fortran's order. "
            "Save them again by numpy.savez(path, images=numpy.ascontiguousarray(images))."
        )
    is_stored = npz.member.compress_type == zipfile.ZIP_STORED
    state = npz.path.stat()
    content = [str(npz.path.resolve()), npz.member.filename, state.st_size, state.st_mtime_ns]
    name = f"{npz.path.stem}-{json_digest(content)[:16]}.{'checked' if is_stored else 'npy'}"
    copy = cache_dir / "npz" / name
    size = 0 if is_stored else npz.member.file_size
    try:
        if not _is_whole(copy, size):  # without the lock, which a cache may be unable to hold
            with locked(copy.with_suffix(".lock")):
                if not _is_whole(copy, size):  # another process may have done it meanwhile
                    _copy_pixels(npz, copy, size)
    except OSError as error:
        raise DataError(
            f"data.cache_dir {cache_dir} cannot take {size / 1e9:.1f} GB of {npz.path}: {error}. "
            "Set --data.cache-dir to a place that can."
        ) from error
    if is_stored:
        return UnpackedNpz(npz, npz.path, _member_offset(npz) + npz.header_bytes)
    return UnpackedNpz(npz, copy, npz.header_bytes)


def _is_whole(copy: Path, size: int) -> bool:
    return copy.exists() and copy.stat().st_size == size


def _copy_pixels(npz: NpzFile, copy: Path, size: int) -> None:
    """Read the pixels, which checks them, and write them into the copy unless ``size`` is 0."""
    free = shutil.disk_usage(copy.parent).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{free / 1e9:.1f} GB are free")
    logger.info("%s %s, once", "unpacking" if size else "checking", npz.path)
    with atomic_path(copy) as temporary, temporary.open("wb") as file:
        for block in _blocks(npz):
            if size:
                file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _blocks(npz: NpzFile) -> Iterator[bytes]:
    """Yield the bytes of the images' npy file; apart from the writing, whose errors are others."""
    with _opened(npz.path) as archive, archive.open(npz.member) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _member_offset(npz: NpzFile) -> int:
    """Return where a member's content starts: behind header, name, extra field (APPNOTE 4.3.7)."""
    with npz.path.open("rb") as file:
        file.seek(npz.member.header_offset)
        name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(30))
    return npz.member.header_offset + 30 + int(name_bytes) + int(extra_bytes)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an npz file for reading.

    Raises:
        CorruptFileError: It is damaged, or no such file.
        DataError: It cannot be read for another reason.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise DataError(f"{path} cannot be read: {error}.") from error
        raise CorruptFileError(f"{path} is no readable npz file: {error}") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read shape, order and type of an array, up to where its content starts."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array has version {version} of the npy format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    return shape, fortran_order, dtype


def _read_labels(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int, path: Path
) -> NDArray[np.int64]:
    """Read the labels of ``count`` images.

    Raises:
        DataError: They are no class numbers.
    """
    with archive.open(member) as file:
        _, _, dtype = _read_header(file)
    check_type(dtype, path)
    with archive.open(member) as file:
        return class_numbers(npy.read_array(file, allow_pickle=False), count, path)


def _to_uint8(dtype: np.dtype) -> str:
    """Write how images of another type become uint8, which depends on what their white is."""
    if dtype.kind == "b":
        return "Save 255 * images.astype('uint8')."
    if dtype.kind in "ui":
        return (
            "Save images.astype('uint8') if white is 255, or numpy.round(images / 257)"
            ".astype('uint8') if it is 65535."
        )
    if dtype.kind == "f":
        return (
            "Save numpy.round(255 * images).astype('uint8') if they are from 0 to 1, or "
            "numpy.round(127.5 * (images + 1)).astype('uint8') if from -1 to 1."
        )
    return "Save them as 8-bit pixels."


def _image_shape(shape: tuple[int, ...], key: str, path: Path) -> tuple[int, ...]:
    """Return the shape ``(N, H, W, C)`` of images of shape ``(N, H, W)`` or that."""
    if 0 in shape[1:]:
        raise DataError(f"{key} in {path} must have pixels, got shape {shape}.")
    one_image = len(shape) == 3 and shape[-1] in (1, 3, 4)
    if len(shape) == 3 and not one_image:
        return (*shape, 1)
    if len(shape) == 4 and shape[-1] in (1, 3):
        return shape
    way_out = ""
    if one_image:
        way_out = " Save images[None] if it is one image."
    elif len(shape) == 4 and shape[1] in (1, 3):
        way_out = " Save images.transpose(0, 2, 3, 1)."
    elif len(shape) == 4 and shape[-1] == 4:
        way_out = " Save images[..., :3] if none is transparent."
    raise DataError(
        f"{key} in {path} must have shape (N, H, W) or (N, H, W, 1 or 3), got {shape}.{way_out}"
    )


def _row_shape(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """Return the shape ``(N, 3, H, H)`` of ImageNet-64's rows ``(N, 3HH)``."""
    size = round((shape[1] / 3) ** 0.5) if len(shape) == 2 else 0
    if len(shape) != 2 or shape[1] != 3 * size * size:
        raise DataError(f"data in {path} must have shape (N, 3 * H * H), got {shape}.")
    return (shape[0], 3, size, size)

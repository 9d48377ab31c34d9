"""The image files below a folder, decoded when they are asked for."""

import hashlib
import logging
import multiprocessing
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ImageBatch
from tdc_ray.data.pixels import channels_first, to_size
from tdc_ray.data.sources.image_file import is_deep, is_plain, read_pixels
from tdc_ray.data.sources.walk import image_paths, subfolders
from tdc_ray.errors import CorruptFileError, DataError

MAX_NAMED = 20
"""Most corrupt files that an error names; the log has named every one of them."""

MAX_PROBED, MAX_CHECKED = 1000, 100
"""Most images whose headers a fingerprint, and the check when a folder is opened, look at."""

logger = logging.getLogger(__name__)


def open(config: DataConfig) -> "FolderImages":
    """List the image files below the path.

    Raises:
        DataError: There is none, one lies in no class, none can be decoded, or of one of some that
            are looked at it is unknown what white is.
    """
    assert config.path is not None  # DataConfig's own rule
    path = Path(config.path)
    if not path.is_dir():
        raise DataError(f"data.path {path} must be a folder of images (data.source folder).")
    images = FolderImages(path, config)
    images.__getitems__([0])  # one must be readable, before any work starts
    images.check_white()
    return images


class FolderImages:
    """Image files in the order of their paths; in place of one that is corrupt comes the next.

    The paths are kept as one byte string: a list of a million of them would take ten times the
    memory, and that again in every loader process.
    """

    def __init__(self, root: Path, config: DataConfig) -> None:
        """List the files, without opening one; warn of those that are no images.

        Raises:
            DataError: There is none, a folder cannot be listed, a link leads to nothing, an image
                lies in no class, or a class has no image.
        """
        self.root, self.config = root, config
        self._paths, self._ends, labels = bytearray(), array("q"), array("q")
        classes: list[str] = []
        left_out: Counter[str] = Counter()
        for path in image_paths(root, left_out):
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
        _check_found(root, len(self._ends), left_out)
        if config.labels_from_folders:
            _check_classes(root, classes)
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
        """Hash the files' places, sizes and times, the shape they are brought to, and labels.

        Files that were once decoded otherwise are told from those by how they are decoded now:
        some of them, evenly spread, tell of what kind a folder's images are.
        """
        labelled = " labels" if self.config.labels_from_folders else ""
        shape = f"{self.config.image_size} {self.config.num_channels}{labelled}"
        digest, root = hashlib.sha256(shape.encode()), self.root.resolve()
        if not all(is_plain(root / path) for path in self._spread(MAX_PROBED)):
            digest.update(b" as shown")
        for index in range(len(self)):
            path = root / self.path(index)
            stat = path.stat()
            digest.update(os.fsencode(f"{path} {stat.st_size} {stat.st_mtime_ns}\n"))
        return digest.hexdigest()[:16]

    def check_white(self) -> None:
        """Decode those of some images, evenly spread, that have grey of more than 8 bits.

        Raises:
            DataError: It is unknown what value white has.
        """
        for path in self._spread(MAX_CHECKED):
            if is_deep(self.root / path):
                with suppress(CorruptFileError):  # counted when it is asked for
                    self._decode(self.root / path)

    def _spread(self, count: int) -> Iterator[str]:
        """Yield the paths of at most ``count`` images, evenly spread."""
        return (self.path(index) for index in range(0, len(self), -(-len(self) // count)))

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
        pixels = read_pixels(path, self.config.num_channels)
        return to_size(channels_first(pixels[None]), self.config)[0]


def _check_found(root: Path, num_images: int, left_out: Counter[str]) -> None:
    """Warn of files that are no images.

    Raises:
        DataError: There are no others.
    """
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common())
    if not num_images:
        found = f"the files in it are of kinds that are not read: {kinds}" if kinds else "no file"
        raise DataError(f"data.path {root} holds no image, such as a .png or .jpg: {found}.")
    if kinds:
        total = num_images + left_out.total()
        logger.warning(
            "%d of %d files in %s are left out, being of kinds that are not read: %s",
            left_out.total(),
            total,
            root,
            kinds,
        )


def _check_classes(root: Path, classes: list[str]) -> None:
    """Refuse folders of classes that would shift the numbers of the others.

    Raises:
        DataError: One holds no image.
    """
    if empty := [name for name in subfolders(root) if name not in set(classes)]:
        raise DataError(
            f"{', '.join(str(root / name) for name in empty[:MAX_NAMED])} must hold an image, "
            "being a class by data.labels_from_folders. Remove it, or put its images there."
        )

"""Encoded images that are decoded when they are asked for, whatever they lie in."""

import logging
import multiprocessing
import os
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ImageBatch
from tdc_ray.data.pixels import channels_first, to_size
from tdc_ray.data.sources.image_file import Encoded, read_header, read_pixels
from tdc_ray.data.sources.warn import warn_once
from tdc_ray.errors import CorruptFileError, DataError

MAX_NAMED = 20
"""Most corrupt files that an error names; the log has named every one of them."""

MOST_CLASSES = 2**20
"""Labels are below this: each class takes memory in a network."""

MAX_CLASSES_NAMED = 10
"""Most classes without an image that a warning names."""

MAX_CHECKED, MAX_NAMES = 100, 10_000
"""Most images whose headers are checked when a dataset is opened, as many again of rare kinds, and
most whose names are looked at for these."""

USUAL_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"})
"""Of kinds of images that say which value is white."""

logger = logging.getLogger(__name__)


class Names:
    """A list of names as one byte string: a list of a million would take ten times the memory."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """Pack names, of any characters that file systems allow."""
        self._bytes, self._ends = bytearray(), array("q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Add a name."""
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[index]]))


class EncodedImages(ABC):
    """Encoded images in a fixed order; in place of one that is corrupt comes the next.

    What is known of them takes little memory: every loader process has it, too.
    """

    def __init__(
        self,
        path: Path,
        config: DataConfig,
        labels: Tensor,
        num_classes: int | None,
        left_out: Counter[str],
    ) -> None:
        """Wrap what a source found.

        Args:
            path: Where the images are, for errors.
            config: The shape that they are brought to, and how many may be corrupt.
            labels: int64 ``(N,)``, -1 where there are none.
            num_classes: None unless all have a label.
            left_out: How many files or entries are no images of the dataset, by the reason.
        """
        self.root, self.config, self.left_out = path, config, left_out
        self.num_classes, self.labels = num_classes, labels
        # How many images are known to be corrupt, then their indices: shared with loader
        # processes.
        self._corrupt = multiprocessing.Array("q", 1 + min(config.max_corrupt, len(self)))

    @abstractmethod
    def encoded(self, index: int) -> Encoded:
        """Return an image as it is stored.

        Raises:
            DataError: What it lies in is gone, or was cut short.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what tells an image from the others."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a name for the content; see ``ImageDataset``."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        images, read = zip(*(self._readable(index) for index in indices), strict=True)
        return ImageBatch(torch.stack(images), self.labels[list(read)])

    def checked(self) -> Self:
        """Return the dataset once it is known that work on it can start.

        Raises:
            CorruptFileError: No image can be decoded.
            DataError: Of one of some that are looked at, those with grey of more than 8 bits, it
                is unknown what value white has.
        """
        self.__getitems__([0])
        for index in {*self.spread(MAX_CHECKED), *islice(self._rare(), MAX_CHECKED)}:
            encoded = self.encoded(index)
            header = read_header(encoded)
            if header is not None and header.is_deep:
                with suppress(CorruptFileError):  # counted when it is asked for
                    self._decode(encoded)
        return self

    def _rare(self) -> Iterator[int]:
        """Yield the indices of files of rare kinds among some that are evenly spread."""
        if isinstance(self.encoded(0), Path):
            for index in self.spread(MAX_NAMES):
                if Path(self.name(index)).suffix.lower() not in USUAL_SUFFIXES:
                    yield index

    def spread(self, count: int) -> Iterator[int]:
        """Yield the indices of at most ``count`` images, evenly spread."""
        return iter(range(0, len(self), -(-len(self) // count)))

    def _readable(self, index: int) -> tuple[Tensor, int]:
        """Decode an image, or the first one after it that can be; return it and its index."""
        reason = ""
        for position in range(index, index + len(self)):
            candidate = position % len(self)
            try:
                return self._decode(self.encoded(candidate)), candidate
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
        names = [self.name(other) for other in [index, *corrupt]]
        raise CorruptFileError(f"{reason} {corrupt_advice(self.config, names)}")

    def _decode(self, file: Encoded) -> Tensor:
        pixels = read_pixels(file, self.config.num_channels)
        return to_size(channels_first(pixels[None]), self.config)[0]


def corrupt_advice(config: DataConfig, names: Sequence[str]) -> str:
    """Return what an error says of corrupt files, the first of which was just named."""
    more = ", ..." if len(names) > MAX_NAMED else ""
    return (
        f"With it {len(names)} of the files in {config.path} are corrupt, and data.max_corrupt is "
        f"{config.max_corrupt}: {', '.join(names[:MAX_NAMED])}{more}. Mend or remove them, or "
        "raise --data.max-corrupt."
    )


def class_labels(values: Sequence[int | str | None], path: Path) -> tuple[Tensor, int | None]:
    """Number labels: numbers stay, names are numbered in their order.

    Args:
        values: Of every image; None where it has none.
        path: Where the images are, for messages.

    Returns:
        Labels ``(N,)``, and how many classes there are: -1 and None unless all images have one.

    Raises:
        DataError: Some are numbers, others names.
    """
    missing = sum(value is None or (isinstance(value, int) and value < 0) for value in values)
    if missing:
        if missing < len(values):
            warn_once(f"labels of {path} are left out: {missing} of {len(values)} have none")
        return torch.full((len(values),), -1), None
    names = sorted({value for value in values if isinstance(value, str)})
    if not names:
        if (largest := max(int(value) for value in values if value is not None)) >= MOST_CLASSES:
            raise DataError(f"labels of {path} must be below {MOST_CLASSES}, got {largest}.")
        numbers = torch.tensor(values, dtype=torch.int64)
        warn_of_empty_classes(numbers, largest + 1, path)
        return numbers, largest + 1
    if any(isinstance(value, int) for value in values):
        raise DataError(
            f"labels of {path} must be all numbers or all names, got both. Write names alone."
        )
    number_of = {name: number for number, name in enumerate(names)}
    return torch.tensor([number_of[str(value)] for value in values]), len(names)


def warn_of_empty_classes(labels: Tensor, num_classes: int, path: Path) -> None:
    """Warn of class numbers that no image has.

    Args:
        labels: ``(N,)``, from 0 on.
        num_classes: The largest number plus 1.
        path: Where the images are.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    if empty := (counts == 0).nonzero()[:, 0].tolist():
        more = ", ..." if len(empty) > MAX_CLASSES_NAMED else ""
        warn_once(
            f"{len(empty)} of {num_classes} classes of {path} have no image: "
            f"{', '.join(map(str, empty[:MAX_CLASSES_NAMED]))}{more}. Number the classes from 0 "
            "on without gaps, if the network need not have them"
        )

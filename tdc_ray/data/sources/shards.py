"""Images in shards, files that hold many encoded images: where each lies is noted once, on a disk.

A source walks through a shard once and yields its entries; what they say goes into an index in the
cache, and so does a copy of the images where they lie compressed. Images are then read one by one.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tdc_ray.config.data import DataConfig
from tdc_ray.data.sources.encoded import EncodedImages, Names, class_labels
from tdc_ray.data.sources.image_file import Member
from tdc_ray.data.sources.imagefolder import Label
from tdc_ray.data.sources.walk import OTHER_SPLIT, file_paths, in_train, is_split
from tdc_ray.errors import DataError, StorageFailedError
from tdc_ray.storage.digest import json_digest
from tdc_ray.storage.files import atomic_path, locked
from tdc_ray.storage.object_store import resolve_path

VERSION = 3
"""Rises with what is in an index, so that older ones are made again."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a shard."""

    name: str
    """What tells it from the shard's others."""

    label: Label

    caption: str | None = None
    """None means that there is none, or that none was asked for."""

    content: bytes | None = None
    """None means that it lies in the shard, ``size`` bytes from ``offset`` on."""

    offset: int = 0
    size: int = 0


class Entries(Protocol):
    """A function that walks through a shard."""

    def __call__(self, path: Path, left_out: Counter[str], *, captions: bool) -> Iterator[Entry]:
        """Yield the images; count what is left out, by the reason; read captions if asked to."""
        ...


@dataclass(frozen=True, slots=True)
class Shard:
    """What the index of a shard says."""

    path: Path
    index: Path
    content: Path
    """The file that the images lie in: the shard, or a copy of its images."""

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: Sequence[Label]
    captions: Names
    """Of every image, where captions were asked for."""

    left_out: Counter[str]

    def read(self, row: int) -> bytes:
        """Read an image as it is stored.

        Raises:
            DataError: The file is gone, or ends early.
        """
        size = int(self.sizes[row])
        try:
            with self.content.open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, int(self.offsets[row]))
        except OSError as error:
            raise DataError(
                f"{self.content} can no longer be read: {error}. Start again."
            ) from error
        if len(content) != size:
            raise DataError(f"{self.content} has been cut short. Start again.")
        return content

    def name(self, row: int) -> str:
        """Return what an image is called, with its shard."""
        with np.load(self.index, allow_pickle=False) as arrays:
            end = arrays["name_ends"][row]
            start = arrays["name_ends"][row - 1] if row else 0
            name = arrays["names"][start:end].tobytes()
        return f"{self.path}: {os.fsdecode(name)}"


class ShardImages(EncodedImages):
    """The images of all shards, in order; where captioned, labels are the captions' numbers."""

    def __init__(
        self, path: Path, config: DataConfig, shards: Sequence[Shard], unread: int
    ) -> None:
        """Wrap shards, ``unread`` others of which are of other splits.

        Raises:
            DataError: No shard has an image, or labels are of two kinds.
        """
        left_out = sum((shard.left_out for shard in shards), Counter[str]())
        if unread:
            left_out[f"shards {OTHER_SPLIT}"] = unread
        labels = [label for shard in shards for label in shard.labels]
        if not labels:
            found = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise DataError(f"data.path {path} holds no image: {found or 'its shards are empty'}.")
        self.captions: Names | None = None
        if config.text_encoder is None:
            numbers, num_classes = class_labels(labels, path)
        else:
            numbers, num_classes = torch.arange(len(labels)), None
            self.captions = Names(text for shard in shards for text in shard.captions)
        super().__init__(path, config, numbers, num_classes, left_out)
        self._shards = [replace(shard, labels=(), captions=Names()) for shard in shards]
        self._ends = np.cumsum([len(shard.sizes) for shard in shards])

    def encoded(self, index: int) -> Member:
        """Read an image as it is stored."""
        shard, row = self._place(index)
        return Member(shard.read(row), functools.partial(shard.name, row))

    def name(self, index: int) -> str:
        """Return what an image is called, with its shard."""
        shard, row = self._place(index)
        return shard.name(row)

    def fingerprint(self) -> str:
        """Hash names, sizes and times of the shards, labels, and the shape that is asked for."""
        digest = hashlib.sha256(f"{self.config.image_size} {self.config.num_channels}".encode())
        for shard in self._shards:
            stat = shard.path.stat()
            state = f"{shard.path.name} {stat.st_size} {stat.st_mtime_ns} {len(shard.sizes)}\n"
            digest.update(os.fsencode(state))
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()[:16]

    def _place(self, index: int) -> tuple[Shard, int]:
        """Return an image's shard, and its number there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard, index - int(self._ends[number]) + len(shard.sizes)


def list_shards(
    config: DataConfig, suffix: str, entries: Entries, *, copies: bool = False
) -> ShardImages:
    """Open a shard, or all below a folder that are to train on, in the order of their paths.

    Args:
        config: The path, and where indices are kept.
        suffix: Of the shards of a folder.
        entries: Walks through a shard.
        copies: Whether it yields the images' content, which is copied into the cache.

    Raises:
        DataError: There is none, one cannot be read, or the cache cannot take the index, or the
            copies.
    """
    assert config.path is not None  # DataConfig's own rule
    path, cache_dir = Path(config.path), resolve_path(config.cache_dir)
    paths = shard_paths(path, suffix)
    if not paths:
        raise DataError(f"data.path {path} holds no {suffix} file (data.source {config.source}).")
    chosen = [name for name in paths if in_train(name)] if is_split(paths) else paths
    captions = config.text_encoder is not None
    indices = {
        path / name: _index(path / name, entries, cache_dir, captions=captions) for name in chosen
    }
    if copies:
        _check_space(indices, cache_dir)
    shards = [_open(*both, entries, captions=captions) for both in indices.items()]
    return ShardImages(path, config, shards, len(paths) - len(chosen))


def shard_paths(path: Path, suffix: str) -> list[str]:
    """Return the paths of shards below a folder, relative to it; of a file that of itself.

    Raises:
        DataError: A folder cannot be listed, or a link leads to nothing.
    """
    if not path.is_dir():
        return [""]
    return [name for name in file_paths(path, {suffix}) if Path(name).name != "metadata.parquet"]


def _index(path: Path, entries: Entries, cache_dir: Path, *, captions: bool) -> Path:
    """Return the path of a shard's index.

    Raises:
        DataError: There is no such shard.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error}. Mend or remove it.") from error
    document = [VERSION, str(path.resolve()), state.st_size, state.st_mtime_ns, entries.__module__]
    document += ["captions"] if captions else []
    return cache_dir / "shards" / f"{path.stem}-{json_digest(document)[:16]}.npz"


def _check_space(indices: Mapping[Path, Path], cache_dir: Path) -> None:
    """Check that the disk of the cache can take copies of the images of shards without any.

    Encoded images are as large inside their shards as outside of them.

    Raises:
        DataError: It cannot.
    """
    sizes = [path.stat().st_size for path, index in indices.items() if not index.exists()]
    places = [place for place in (cache_dir, *cache_dir.absolute().parents) if place.is_dir()]
    needed, free = sum(sizes), shutil.disk_usage(places[0]).free
    if needed > free:
        raise DataError(
            f"data.cache_dir {cache_dir} needs about {needed / 1e6:.0f} MB for copies of the "
            f"images of {len(sizes)} files, and its disk has {free / 1e6:.0f} MB free. Set "
            "--data.cache-dir to a place that has them."
        )


def _open(path: Path, index: Path, entries: Entries, *, captions: bool) -> Shard:
    """Read a shard's index, which is made before if there is none.

    Raises:
        DataError: The shard cannot be read, or an image lacks the caption that is asked for.
    """
    try:
        shard = _load(path, index)
        if shard is None:
            with locked(index.with_suffix(".lock")):
                shard = _load(path, index)  # another process may have made it meanwhile
                if shard is None:
                    _make(path, index, entries, captions=captions)
                    shard = _load(path, index)
    except (OSError, StorageFailedError) as error:
        cache_dir = index.parents[1]
        raise DataError(
            f"data.cache_dir {cache_dir} cannot take the index of {path}: {error}. Set "
            "--data.cache-dir to a place that can."
        ) from error
    assert shard is not None  # as it was made whole
    return shard


def _load(path: Path, index: Path) -> Shard | None:
    """Load an index; None where there is none, or the copy of the images is not whole."""
    copy = index.with_suffix(".images")
    with suppress(FileNotFoundError, ValueError, KeyError, zipfile.BadZipFile):
        with np.load(index, allow_pickle=False) as arrays:
            offsets, sizes = arrays["offsets"], arrays["sizes"]
            document = json.loads(arrays["document"].tobytes())
        is_copied = document["copied"] > 0
        if is_copied and copy.stat().st_size != document["copied"]:
            return None
        return Shard(
            path=path,
            index=index,
            content=copy if is_copied else path,
            offsets=offsets,
            sizes=sizes,
            labels=document["labels"],
            captions=Names(document.get("captions", ())),
            left_out=Counter(document["left_out"]),
        )
    return None


def _make(path: Path, index: Path, entries: Entries, *, captions: bool) -> None:
    """Walk through a shard; write its index, and the copy of its images if it yields them.

    Equal images are copied once: a small file may repeat one until no disk could take them.
    """
    logger.info("reading through %s, once", path)
    offsets, sizes, labels, texts, name_ends, names = [], [], [], [], [], bytearray()
    left_out, end, copied = Counter[str](), 0, dict[bytes, int]()
    with atomic_path(index.with_suffix(".images")) as temporary, temporary.open("wb") as copy:
        for entry in entries(path, left_out, captions=captions):
            if entry.content is not None:
                content_digest = hashlib.sha256(entry.content).digest()
                offset = copied.setdefault(content_digest, end)
                if offset == end:
                    end += copy.write(entry.content)
                offsets.append(offset)
                sizes.append(len(entry.content))
            else:
                offsets.append(entry.offset)
                sizes.append(entry.size)
            labels.append(entry.label)
            if captions:
                texts.append(_caption(entry, path))
            names += os.fsencode(entry.name)
            name_ends.append(len(names))
        copy.flush()
        os.fsync(copy.fileno())
    document = {"copied": end, "labels": labels, "left_out": left_out}
    document |= {"captions": texts} if captions else {}
    with atomic_path(index) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            offsets=np.array(offsets, np.int64),
            sizes=np.array(sizes, np.int64),
            names=np.frombuffer(bytes(names), np.uint8),
            name_ends=np.array(name_ends, np.int64),
            document=np.frombuffer(json.dumps(document).encode(), np.uint8),
        )
        file.flush()
        os.fsync(file.fileno())


def _caption(entry: Entry, path: Path) -> str:
    """Return an image's caption.

    Raises:
        DataError: It has none.
    """
    if entry.caption is None:
        raise DataError(
            f"{path} must have a caption for every image with data.text_encoder (the column text "
            f"or caption of a parquet file, a .txt beside an image in a tar file): {entry.name} "
            "has none. Write it, empty for none."
        )
    return entry.caption

"""WebDataset: tar files in which neighbours of one name are a sample, such as a.jpg and a.cls."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tdc_ray.config.data import DataConfig
from tdc_ray.data.sources.image_file import image_suffixes
from tdc_ray.data.sources.imagefolder import Label
from tdc_ray.data.sources.shards import Entry, ShardImages, list_shards
from tdc_ray.data.sources.walk import HIDDEN, is_hidden
from tdc_ray.data.sources.warn import warn_once
from tdc_ray.errors import CorruptFileError, DataError

SUFFIX = ".tar"

LABELS_KEYS = ("label", "cls")
"""Keys of a ``.json`` object that may hold the label, the first one counts."""

CAPTION_SUFFIX = ".txt"

MAX_TEXT_BYTES = 2**20
"""Files of labels and captions that are larger are not read."""

FURTHER = "another image of its sample"
"""Reason why an image is left out."""


def open(config: DataConfig) -> ShardImages:
    """Open a tar file, or all below a folder.

    Raises:
        DataError: There is none, one is damaged, none of the images can be decoded, or of one of
            some that are looked at it is unknown what white is.
    """
    return list_images(config).checked()


def list_images(config: DataConfig) -> ShardImages:
    """List the images of a tar file, or of all below a folder.

    Raises:
        DataError: There is none, or one is damaged.
    """
    images = list_shards(config, SUFFIX, entries)
    if num_further := images.left_out[FURTHER]:
        warn_once(
            f"{num_further} images of {images.root} are left out, {len(images)} are taken: of the "
            "images of a sample the first is, and a sample's name ends at its first dot (a of "
            "a.1.png). If each is a sample of its own, write the tar file with other characters "
            "for these dots (a-1.png)"
        )
    return images


def entries(path: Path, left_out: Counter[str], *, captions: bool) -> Iterator[Entry]:
    """Yield the first image of every sample, with label and caption; nothing is extracted.

    Args:
        path: Of the tar file.
        left_out: Counts what is no image of a sample.
        captions: Whether captions are read.

    Raises:
        CorruptFileError: It is damaged, or compressed.
        DataError: A label is neither a whole number nor a name, or a caption is no text.
    """
    sample, image, label, caption = "", None, None, None
    try:
        with tarfile.open(path, "r:") as tar:
            end = path.stat().st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember all
                key, suffix = _key_and_suffix(member.name)
                if not member.isfile() or member.issparse() or _is_hidden(key):
                    if not member.isdir():
                        left_out[HIDDEN if member.isfile() else "no plain file"] += 1
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                if key != sample:
                    if image is not None:
                        yield _entry(image, label, caption)
                    sample, image, label, caption = key, None, None, None
                if PurePosixPath(f"a{suffix}").suffix in image_suffixes():
                    if image is None:
                        image = member
                    else:
                        left_out[FURTHER] += 1
                elif suffix in (".cls", ".json"):
                    found = _label(tar, member, suffix, path)
                    label = found if label is None else label
                elif captions and suffix == CAPTION_SUFFIX:
                    caption = _caption(tar, member, path)
                else:
                    left_out[suffix or "without a suffix"] += 1
            if image is not None:
                yield _entry(image, label, caption)
            _check_end(path, tar.offset)
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is no readable tar file: {error}. Fetch or write it again; a compressed one "
            "must be uncompressed."
        ) from error


def _entry(image: tarfile.TarInfo, label: Label, caption: str | None) -> Entry:
    return Entry(image.name, label, caption, offset=image.offset_data, size=image.size)


def _check_end(path: Path, offset: int) -> None:
    """Check that the member after the last one is the mark of the end, and not a damaged one.

    Raises:
        tarfile.ReadError: It is.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"there is no file at byte {offset}")


def _is_hidden(key: str) -> bool:
    """Whether a file, or a folder that it lies in, is nobody's data."""
    return any(is_hidden(part) for part in PurePosixPath(key).parts if part != "..")


def _key_and_suffix(name: str) -> tuple[str, str]:
    """Split a name at the first dot of its last part: ``a/b.c.png`` is ``a/b`` and ``.c.png``."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".") if not file.startswith(".") else (file, "", "")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, path: Path) -> Label:
    """Read the label of a ``.cls`` or ``.json`` file; None where a ``.json`` file holds none.

    Raises:
        DataError: It is neither a whole number nor a name.
    """
    text = _read(tar, member, path).decode(errors="replace").strip()
    label: object = int(text) if text.isascii() and text.isdecimal() else text or None
    if suffix == ".json":
        try:
            label = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: {member.name} is no JSON: {error}. Mend it.") from error
        if isinstance(label, dict):
            label = next((label[key] for key in LABELS_KEYS if key in label), None)
    if label is None or (isinstance(label, int | str) and not isinstance(label, bool)):
        return label
    raise DataError(
        f"{path}: the label in {member.name} must be a whole number or a name, got {label!r}."
    )


def _caption(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> str:
    """Read a caption.

    Raises:
        DataError: It is no text.
    """
    try:
        return _read(tar, member, path).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the caption {member.name} must be a text in UTF-8: {error}. Mend it."
        ) from error


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    """Read a file of a label or a caption.

    Raises:
        DataError: It is too large.
    """
    file = tar.extractfile(member)
    assert file is not None  # it is a plain file
    if member.size > MAX_TEXT_BYTES:
        raise DataError(f"{path}: {member.name} is too large for a label or caption. Remove it.")
    return file.read()

"""A Hugging Face image folder: files that ``metadata.jsonl`` or ``metadata.csv`` name, labelled.

Its column ``file_name`` is a path below the folder of the metadata file, ``label`` a number or a
name, ``text`` a caption. Of the splits of a data set the part to train on is read.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from tdc_ray.config.data import DataConfig
from tdc_ray.data.sources.encoded import MAX_NAMED, Names, class_labels
from tdc_ray.data.sources.folder import FolderImages, check_found
from tdc_ray.data.sources.walk import OTHER_SPLIT, file_paths, image_paths, in_train, is_split
from tdc_ray.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the files that tell a Hugging Face image folder from others."""

UNNAMED = "not named by metadata"
"""Reason why a file is left out."""

CAPTION = "text"
"""Column of the captions, as ``datasets`` and the training scripts of diffusers name it."""

_SURROGATE = re.compile("[\ud800-\udfff]")

Label = int | str | None

Row = tuple[Label, str | None]
"""Label and caption."""


def open(config: DataConfig) -> FolderImages:
    """Open the images that metadata names.

    Raises:
        DataError: There is none, metadata is malformed or names a file that is not there, none can
            be decoded, or of one of some that are looked at it is unknown what white is.
    """
    return list_images(config).checked()


def list_images(config: DataConfig) -> FolderImages:
    """List the images that metadata names, in the order of their paths, without opening one.

    Raises:
        DataError: There is none, or metadata is malformed or names a file that is not there.
    """
    assert config.path is not None  # DataConfig's own rule
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(f"data.path {root} must be a folder (data.source imagefolder).")
    files, left_out = metadata_files(root), Counter[str]()
    if not files:
        raise DataError(
            f"data.path {root} holds no {' or '.join(METADATA)} (data.source imagefolder). "
            "--data.source folder reads images without them."
        )
    rows = _all_rows(root, files)
    found = list(image_paths(root, left_out))
    for name in METADATA:
        del left_out[Path(name).suffix]
    folders = [path.rpartition("/")[0] for path in found]  # of an image's own name train is a word
    takes_train = is_split(folders)
    paths, captions, labels = Names(), Names(), []
    for path, folder in zip(found, folders, strict=True):
        if takes_train and not in_train(folder):
            left_out[OTHER_SPLIT] += 1
            rows.pop(path, None)
        elif path in rows:
            paths.append(path)
            label, caption = rows.pop(path)
            labels.append(label)
            if config.text_encoder is not None:
                captions.append(caption_of(caption, path, f"metadata in {root}"))
        else:
            left_out[UNNAMED] += 1
    if rows:
        names = ", ".join(list(rows)[:MAX_NAMED])
        raise DataError(
            f"metadata in {root} names {len(rows)} images that are not there, or are of kinds "
            f"that are not read: {names}. Put them there, or remove their rows."
        )
    check_found(root, len(paths), left_out)
    if config.text_encoder is not None:  # an image's label is the number of its caption
        return FolderImages(
            root, config, paths, torch.arange(len(paths)), None, left_out, captions
        )
    numbers, num_classes = class_labels(labels, root)
    return FolderImages(root, config, paths, numbers, num_classes, left_out)


def metadata_files(root: Path) -> list[str]:
    """Return the paths of the metadata files below a folder, relative to it.

    Raises:
        DataError: A folder cannot be listed, or a link leads to nothing.
    """
    suffixes = {Path(name).suffix for name in METADATA}
    return [path for path in file_paths(root, suffixes) if Path(path).name in METADATA]


def caption_of(caption: str | None, image: str, where: str) -> str:
    """Return an image's caption.

    Raises:
        DataError: It has none.
    """
    if caption is None:
        raise DataError(
            f"{where} must have a caption, the column {CAPTION}, for every image with "
            f'data.text_encoder: {image} has none. Write it, "" for none.'
        )
    return caption


def _all_rows(root: Path, files: Iterable[str]) -> dict[str, Row]:
    """Read all metadata: labels and captions by the images' paths, relative to ``root``.

    Raises:
        DataError: A file is malformed, or an image is named twice.
    """
    rows: dict[str, Row] = {}
    for file in files:
        for name, row in _rows(root / file):
            path = (PurePosixPath(file).parent / name).as_posix()
            if path in rows:
                raise DataError(f"metadata in {root} names {path} twice. Remove one of its rows.")
            rows[path] = row
    return rows


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield the path, and label and caption, of every row.

    Raises:
        DataError: The file is malformed, or a path leads out of its folder.
    """
    read = _csv_rows if file.suffix == ".csv" else _json_rows
    try:
        for number, row in read(file):
            label = _label(row.get("label"), file, number)
            caption = _text(row.get(CAPTION), file, number)
            yield _path(row.get("file_name"), file, number), (label, caption)
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}. Mend it.") from error


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        rows = [(reader.line_num, row) for row in reader]
    labels = [row.get("label") or None for _, row in rows]
    has_numbers = all(text is None or (text.isascii() and text.isdecimal()) for text in labels)
    for (number, row), text in zip(rows, labels, strict=True):
        yield number, {**row, "label": int(text) if text and has_numbers else text}


def _json_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object")  # of the file
                yield number, row


def _path(name: object, file: Path, number: int) -> str:
    """Return a path below the metadata's folder, in its plain form.

    Raises:
        DataError: It is none.
    """
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"file_name in line {number} of {file} must be the path of an image below its folder, "
            f"got {name!r}."
        )
    return path.as_posix()


def _text(caption: object, file: Path, number: int) -> str | None:
    """Return a row's caption.

    Raises:
        DataError: It is no text: JSON may hold halves of characters, too.
    """
    if caption is None or (isinstance(caption, str) and not _SURROGATE.search(caption)):
        return caption
    raise DataError(f"{CAPTION} in line {number} of {file} must be a text, got {caption!r}.")


def _label(label: object, file: Path, number: int) -> Label:
    """Return a row's label.

    Raises:
        DataError: It is neither a whole number nor a name.
    """
    if label is None or (isinstance(label, int | str) and not isinstance(label, bool)):
        return label
    raise DataError(
        f"label in line {number} of {file} must be a whole number or a name, got {label!r}."
    )

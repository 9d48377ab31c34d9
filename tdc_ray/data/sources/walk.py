"""Which files below a folder are images: links are followed, what systems leave is passed over.

Of data sets that are split, as those on the Hugging Face hub are, the part to train on is taken.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdc_ray.data.sources.image_file import image_suffixes
from tdc_ray.data.sources.warn import warn_once
from tdc_ray.errors import DataError

OF_SYSTEMS = frozenset(
    {
        "__macosx",
        "@eadir",
        "$recycle.bin",
        "desktop.ini",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
"""Names, in lower case, of what systems and archives put among people's files."""

HIDDEN = "hidden"
"""Under which :func:`image_paths` counts what is nobody's data."""

OTHER_SPLIT = "of another split than train"
"""Reason why a file is left out."""

TRAIN = frozenset({"train", "training"})
OTHER_SPLITS = frozenset(
    {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
)
"""Words in names of files and folders that tell the parts of a data set."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is nobody's data: its name begins with a dot, or is a system's."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def image_paths(root: Path, left_out: Counter[str] | None = None) -> Iterator[str]:
    """Yield the images' paths below ``root``, relative to it, in the order of their parts.

    Folders that are links are followed, but for links to a folder that they lie in.

    Args:
        root: The folder.
        left_out: Counts the files of other kinds by suffix, and what is ``HIDDEN``.

    Raises:
        DataError: A folder cannot be listed, or a link leads to nothing.
    """
    return file_paths(root, image_suffixes(), left_out)


def file_paths(
    root: Path, suffixes: Collection[str], left_out: Counter[str] | None = None
) -> Iterator[str]:
    """Yield the paths of files with some suffixes, as :func:`image_paths` does."""
    counter: Counter[str] = Counter() if left_out is None else left_out
    return _walk(root, "", (root.resolve(),), suffixes, counter)


def in_train(path: str) -> bool:
    """Whether a word of a path, such as ``data/train-0.tar``, says that it is to train on."""
    return bool(TRAIN & _words(path))


def is_split(paths: Sequence[str]) -> bool:
    """Whether some paths are to train on, so that others are not."""
    return any(in_train(path) for path in paths)


def train_folder(root: Path) -> Path | None:
    """Return the folder ``train`` of a data set whose folders are its parts.

    They may lie below a folder that has nothing beside it, as unpacked archives have. None means
    that there is none, or that there are images or folders of other names beside it.

    Raises:
        DataError: The folder cannot be listed, or a link leads to nothing.
    """
    folder, parts = _unpacked(root)
    return folder / parts.train[0] if len(parts.train) == 1 and not parts.others else None


def split_to_take(root: Path, *, has_classes: bool = False) -> Path | None:
    """Return the folder ``train`` that images are taken from, where there are other splits, too.

    Unlike in :func:`train_folder` there may be anything beside them.

    Args:
        root: The folder.
        has_classes: Whether it was said that its folders are classes.

    Raises:
        DataError: A folder cannot be listed, or a link leads to nothing.
    """
    folder, parts = _unpacked(root)
    if len(parts.train) != 1 or (parts.others and (has_classes or not parts.other_splits)):
        return None
    return folder / parts.train[0]


def beside_splits(folder: Path) -> list[str]:
    """Return the names of images and folders that are no splits.

    Raises:
        DataError: The folder cannot be listed, or a link leads to nothing.
    """
    return list(_parts(folder).others)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What lies in a folder that may hold splits."""

    train: list[str]
    other_splits: list[str]
    others: dict[str, bool]
    """Images and folders of other names, and whether they are folders."""


def _parts(folder: Path) -> _Parts:
    """List a folder once, as it may hold a million images."""
    entries = _entries(folder, Counter())
    folders = [name for name, is_folder in entries if is_folder]
    return _Parts(
        train=[name for name in folders if name.lower() in TRAIN],
        other_splits=[name for name in folders if name.lower() in OTHER_SPLITS],
        others={
            name: is_folder
            for name, is_folder in entries
            if name.lower() not in TRAIN | OTHER_SPLITS
            and (is_folder or Path(name).suffix.lower() in image_suffixes())
        },
    )


def _unpacked(root: Path) -> tuple[Path, _Parts]:
    """Return the root, or the folder that a chain of lone folders leads to, and its parts."""
    trail = [root.resolve()]
    while True:
        parts = _parts(root)
        if parts.train or parts.other_splits or list(parts.others.values()) != [True]:
            return root, parts
        below = root / next(iter(parts.others))
        if _leads_back(below, trail):
            return root, parts
        root = below
        trail.append(root.resolve())


def lone_splits(root: Path) -> list[str]:
    """Return the names of a folder's parts where it has nothing else, and none to train on.

    Raises:
        DataError: The folder cannot be listed, or a link leads to nothing.
    """
    names = [name for name, _ in _entries(root, Counter())]
    are_splits = len(names) > 1 and all(name.lower() in OTHER_SPLITS for name in names)
    return names if are_splits else []


def in_other_split(root: Path, folder: str) -> bool:
    """Whether a folder below ``root`` lies in a part of a data set beside one to train on.

    Raises:
        DataError: A folder cannot be listed, or a link leads to nothing.
    """
    folders = folder.split("/")
    return any(
        name.lower() in OTHER_SPLITS and train_folder(root.joinpath(*folders[:depth])) is not None
        for depth, name in enumerate(folders)
    )


def subfolders(root: Path) -> list[str]:
    """Return the names of the folders in ``root`` that :func:`image_paths` looks into.

    Raises:
        DataError: It cannot be listed, or a link leads to nothing.
    """
    trail = (root.resolve(),)
    names = [name for name, is_folder in _entries(root, Counter()) if is_folder]
    return [name for name in names if not _leads_back(root / name, trail)]


def _words(path: str) -> set[str]:
    return set(re.split(r"[\W_\d]+", path.lower()))


def _walk(
    root: Path,
    folder: str,
    trail: tuple[Path, ...],
    suffixes: Collection[str],
    left_out: Counter[str],
) -> Iterator[str]:
    """Yield the paths below a folder of ``root``; ``trail`` are the folders that it lies in."""
    for name, is_folder in _entries(root / folder, left_out):
        path = f"{folder}{name}"
        if not is_folder:
            suffix = Path(name).suffix.lower()
            if suffix in suffixes:
                yield path
            else:
                left_out[suffix or "without a suffix"] += 1
        elif _leads_back(root / path, trail):
            warn_once(f"{root / path} is left out: it links to a folder that it lies in")
        else:
            below = (*trail, (root / path).resolve())
            yield from _walk(root, f"{path}/", below, suffixes, left_out)


def _entries(folder: Path, left_out: Counter[str]) -> list[tuple[str, bool]]:
    """Return the names in a folder that are not hidden, sorted, and whether they are folders."""
    try:
        with os.scandir(folder) as scan:
            found = list(scan)
        entries = [entry for entry in found if not is_hidden(entry.name)]
        if len(entries) < len(found):
            left_out[HIDDEN] += len(found) - len(entries)
        for entry in entries:
            if entry.is_symlink() and not (folder / entry.name).exists():
                raise DataError(f"{entry.path} is a link to nothing. Mend or remove it.")
        return sorted((e.name, e.is_dir()) for e in entries if e.is_dir() or e.is_file())
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error}.") from error


def _leads_back(folder: Path, trail: Sequence[Path]) -> bool:
    """Whether a folder is a link to one of those that it lies in, or above them."""
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    return any(above.is_relative_to(target) for above in trail)

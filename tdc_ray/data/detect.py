"""What data a path holds."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tdc_ray.config.data import BASE_SAMPLES, BUNDLED, OF_BASE, DataConfig, Source
from tdc_ray.config.hub import hub_dataset
from tdc_ray.data.sources import parquet, webdataset
from tdc_ray.data.sources.datasets import is_saved
from tdc_ray.data.sources.image_file import image_suffixes
from tdc_ray.data.sources.imagefolder import metadata_files
from tdc_ray.data.sources.npz import npz_in
from tdc_ray.data.sources.shards import shard_paths
from tdc_ray.data.sources.walk import (
    beside_splits,
    image_paths,
    lone_splits,
    split_to_take,
)
from tdc_ray.errors import ConfigError, DataError
from tdc_ray.storage.object_store import resolve_path

SHARDS: dict[str, Source] = {parquet.SUFFIX: "parquet", webdataset.SUFFIX: "webdataset"}
"""By the suffix of the files."""

UNPACKED_BY = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.zst": "unzstd",
    ".tar.xz": "unxz",
    ".tar.bz2": "bunzip2",
    ".zip": "unzip",
}
"""Commands that unpack files, by their names' ends."""

logger = logging.getLogger(__name__)


def data_config(source: str, data: DataConfig, name: str = "--data") -> DataConfig:
    """Return settings of the data that a path, or a name without one, stands for; others stay.

    Of a folder of images whose folders are splits it is that of the split train. A name on the hub
    is not looked for.

    Args:
        source: The path, the name of a bundled source, or ``base``, whose samples are drawn later.
        data: Whose other settings are taken.
        name: Of the argument that named the source, for the error.

    Raises:
        ConfigError: The path holds no data of a known kind, or of several kinds.
        DataError: A folder cannot be listed, or a link leads to nothing.
    """
    path = resolve_path(source)
    none: dict[str, Any] = dict.fromkeys(OF_BASE)
    if source in (*BUNDLED, BASE_SAMPLES):
        if path.exists():
            raise ConfigError(
                f"{name} {source} is the name of a source without a path and of one that exists: "
                f"write ./{source} for the path, or remove it."
            )
        drawn = {name: getattr(data, name) for name in OF_BASE if source == BASE_SAMPLES}
        # In two steps, as each is checked.
        bundled = replace(data, source="digits", path=None, labels_from_folders=False, **none)
        return replace(bundled, source=cast(Source, source), **drawn)
    data = replace(data, **none)
    kinds: list[Source] = ["datasets"] if hub_dataset(source) else _kinds(path)
    if not kinds:
        raise ConfigError(
            f"{name} must be {' or '.join(BUNDLED)}, a folder of images, an npz, parquet or tar "
            "file or a folder of such files, a folder by the save_to_disk of datasets, the folder "
            f"of cifar-10-batches-py, or OWNER/NAME on the hub, got {source}{_hint(path)}."
        )
    if len(kinds) > 1:
        raise ConfigError(
            f"{name} {source} holds data of several kinds, {' and '.join(kinds)}: name the files "
            f"or the subfolder to take{', or set --data.source' if name == '--data' else ''}."
        )
    if kinds[0] != "folder":
        return replace(data, source=kinds[0], path=source, labels_from_folders=False)
    return replace(
        data, source="folder", path=train_split(source, has_classes=data.labels_from_folders)
    )


def train_split(folder: str, *, has_classes: bool) -> str:
    """Return the split train of a folder of images, and log that others are left out.

    It is the folder itself where its folders are no splits.

    Args:
        folder: The folder.
        has_classes: Whether it was said that its folders are classes.

    Raises:
        DataError: The folder cannot be listed, a link leads to nothing, or no split is to train
            on.
    """
    root = resolve_path(folder)
    if splits := lone_splits(root):
        raise DataError(
            f"{root} holds the splits {' and '.join(splits)}, and none to train on, such as "
            "train. Name the folder of the one to take."
        )
    train = split_to_take(root, has_classes=has_classes)
    if train is None:
        return folder
    taken, others = train.relative_to(root), beside_splits(train.parent)
    beside = f", and beside them {', '.join(others[:3])}" if others else ""
    more = " and others" if len(others) > 3 else ""
    may_be_classes = any((train.parent / name).is_dir() for name in others)
    hint = " (--data.labels-from-folders takes all folders, as classes)" if may_be_classes else ""
    logger.warning(
        "%s holds splits%s%s: the images of %s are taken%s", folder, beside, more, taken, hint
    )
    return str(train)


def _kinds(path: Path) -> list[Source]:
    """Return the kinds of data that a path holds."""
    suffix = path.suffix.lower()
    if not path.is_dir():
        if suffix == ".npz":
            return ["npz"]
        return [SHARDS[suffix]] if suffix in SHARDS else []
    if (path / "cifar-10-batches-py").is_dir():
        return ["cifar10"]
    if is_saved(path):
        return ["datasets"]
    arrays, is_imagefolder = npz_in(path), bool(metadata_files(path))
    kinds: list[Source] = ["npz"] if arrays else []
    previews = {file.stem for file in arrays}  # such as samples.png beside samples.npz
    if any(Path(image).stem not in previews for image in image_paths(path)):
        kinds.append("imagefolder" if is_imagefolder else "folder")
    if is_imagefolder:
        return kinds or ["imagefolder"]
    return kinds + [kind for suffix, kind in SHARDS.items() if shard_paths(path, suffix)]


def _hint(path: Path) -> str:
    """Write what a path holds that is not of a known kind, and what to do about it."""
    names = [path] if not path.is_dir() else sorted(path.iterdir())
    if packed := [one.name for one in names if one.name.lower().endswith(tuple(UNPACKED_BY))]:
        command = next(to for end, to in UNPACKED_BY.items() if packed[0].lower().endswith(end))
        return (
            f", with a compressed file, whose images cannot be read one by one: {command} "
            f"{packed[0]}"
        )
    if any(one.suffix.lower() == ".arrow" for one in names):
        return ", with Arrow files and no state.json: name a folder that save_to_disk wrote"
    if path.suffix.lower() in image_suffixes() and path.is_file():
        return ", one image: name its folder"
    if not path.is_dir():
        return ""
    others = Counter[str]()
    list(image_paths(path, others))
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    return f", which holds these files: {found}" if found else ", which holds no files"

"""Whether the images are still those that a run, or the training of a first stage, began with."""

import logging
from pathlib import Path

from tdc_ray.config.data import DataConfig
from tdc_ray.data.load import images_fingerprint, load_dataset
from tdc_ray.errors import DataError, StorageError
from tdc_ray.storage.files import exists, read_json, write_json

IMAGES_FILE = "images.json"
"""Name of the file that tells what the images were at the first start."""

BY_TIMES = ("folder", "imagefolder", "parquet", "webdataset", "datasets")
"""Sources whose fingerprint is of files' names, sizes and times, or of how a data set was made,
not of what they hold."""

logger = logging.getLogger(__name__)


def note_images(folder: Path, data: DataConfig) -> None:
    """Write what the images are: how many, of how many classes, and their fingerprint."""
    write_json(folder / IMAGES_FILE, _images(data))


def check_images(folder: Path, data: DataConfig) -> None:
    """Compare the images with those at the first start, if that was noted.

    Files that only moved, or have other names, times or sizes, or were made again, are warned of:
    whether they show something else is not known. Those of npz files are known by what they hold.

    Raises:
        StorageError: There are other classes, or other images of an npz file.
        DataError: The images are missing or malformed.
    """
    changed = _changed(folder, data)
    if changed is None:
        return
    kept_classes = _images(data)["num_classes"] == read_json(folder / IMAGES_FILE)["num_classes"]
    if data.source in BY_TIMES and kept_classes:
        logger.warning("%s What was computed before is of the former ones.", changed)
        return
    raise StorageError(f"{changed} Restore them to resume, or start anew in another folder.")


def warn_of_other_images(folder: Path, data: DataConfig) -> None:
    """Warn that finished work is of other images than are there now, if some are."""
    try:
        changed = _changed(folder, data)
    except DataError:  # finished work needs none
        return
    if changed is not None:
        logger.warning("%s The results are of the former ones.", changed)


def _changed(folder: Path, data: DataConfig) -> str | None:
    """Write how the images differ from those at the first start. None means not at all."""
    path = folder / IMAGES_FILE
    if not exists(path):
        return None
    before, now = read_json(path), _images(data)
    if before == now:
        return None
    numbers = f"{_numbers(before)} then, {_numbers(now)} now"
    if _numbers(before) == _numbers(now):
        numbers = f"{_numbers(now)}, of which some are others, or were written or moved since"
    return f"the images in {data.path or data.source} are not those at the first start: {numbers}."


def _images(data: DataConfig) -> dict[str, object]:
    dataset = load_dataset(data)
    return {
        "num_images": len(dataset),
        "num_classes": dataset.num_classes,
        "fingerprint": images_fingerprint(data),
    }


def _numbers(images: dict[str, object]) -> str:
    classes = images["num_classes"]
    return f"{images['num_images']} images" + (f" of {classes} classes" if classes else "")

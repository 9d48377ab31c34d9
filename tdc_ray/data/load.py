"""The table of sources of images, and the functions that open them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

from tdc_ray.config.data import DataConfig
from tdc_ray.config.hub import hub_dataset, with_recorded_commit
from tdc_ray.data.dataset import ImageDataset
from tdc_ray.data.sources import (
    base,
    cifar10,
    datasets,
    digits,
    folder,
    imagefolder,
    npz,
    parquet,
    photos,
    webdataset,
)
from tdc_ray.data.sources.encoded import EncodedImages
from tdc_ray.errors import DataError
from tdc_ray.storage.files import exists
from tdc_ray.storage.object_store import resolve_path

SOURCES: Mapping[str, Callable[[DataConfig], ImageDataset]] = {
    "digits": digits.open,
    "photos": photos.open,
    "folder": folder.open,
    "npz": npz.open,
    "cifar10": cifar10.open,
    "imagefolder": imagefolder.open,
    "parquet": parquet.open,
    "webdataset": webdataset.open,
    "datasets": datasets.open,
    "base": base.open,
}
"""By ``data.source``."""

ENCODED: Mapping[str, Callable[[DataConfig], EncodedImages]] = {
    "folder": folder.list_images,
    "imagefolder": imagefolder.list_images,
    "parquet": parquet.list_images,
    "webdataset": webdataset.list_images,
    "datasets": datasets.list_images,
}
"""Sources of encoded images, which may each be of another size: lists them, decodes none."""


@functools.lru_cache(maxsize=1)  # a worker does many items on the same data
def load_dataset(config: DataConfig) -> ImageDataset:
    """Open a dataset, with every image at the size and number of channels asked for.

    Raises:
        DataError: It is missing, malformed, or empty, or too many of its files are corrupt.
    """
    if config.path is not None and not (config.is_on_hub or exists(resolve_path(config.path))):
        raise DataError(
            f"data.path {config.path} does not exist (data.source {config.source}). "
            "Set --data.path to where the images are."
        )
    return SOURCES[config.source](config)


def with_commit(config: DataConfig, before: str | None = None) -> DataConfig:
    """Name the commit of a data set on the hub that is named without one; others stay as they are.

    Args:
        config: The settings.
        before: The ``path`` of an earlier call, whose commit is kept if it is the same data set.
            None means that the newest is taken, or where there is no network the one in the cache.

    Raises:
        DataError: It cannot be had.
    """
    if not config.is_on_hub:
        return config
    assert config.path is not None
    kept = with_recorded_commit(config.path, before)
    hub = hub_dataset(kept)
    assert hub is not None
    if kept == before or hub.revision is not None:
        return replace(config, path=kept)
    images = load_dataset(config)
    assert isinstance(images, datasets.ArrowImages)
    return replace(config, path=str(hub.at(images.commit))) if images.commit else config


def current_fingerprint(config: DataConfig) -> str:
    """Return a name for the content of a dataset as it is now, and open it anew where it is used.

    Raises:
        DataError: It is missing, malformed, or empty, or too many of its files are corrupt.
    """
    load_dataset.cache_clear()
    images_fingerprint.cache_clear()
    return images_fingerprint(config)


@functools.lru_cache(maxsize=8)  # it may look at every file
def images_fingerprint(config: DataConfig) -> str:
    """Return a name for the content of a dataset."""
    return load_dataset(config).fingerprint()

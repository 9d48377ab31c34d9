"""What data a path holds."""

from dataclasses import replace
from pathlib import Path
from typing import cast

from tdc_ray.config.data import BUNDLED, DataConfig, Source
from tdc_ray.data.sources.npz import npz_in
from tdc_ray.data.sources.walk import image_paths
from tdc_ray.errors import ConfigError


def data_config(source: str, data: DataConfig, name: str = "--data") -> DataConfig:
    """Return settings of the data that a path, ``digits`` or ``photos``, holds; others stay.

    Args:
        source: The path, or the name of a bundled source.
        data: Whose other settings are taken.
        name: Of the argument that named the source, for the error.

    Raises:
        ConfigError: The path holds no data of a known kind.
    """
    path = Path(source).expanduser()
    labels, data = data.labels_from_folders, replace(data, labels_from_folders=False)
    if source in BUNDLED and path.exists():
        raise ConfigError(
            f"{name} {source} is the name of a bundled source and of a path that exists: write "
            f"./{source} for the path, or remove it."
        )
    if source in BUNDLED:
        return replace(data, source=cast(Source, source), path=None)
    if path.suffix.lower() == ".npz" or (path.is_dir() and npz_in(path)):
        return replace(data, source="npz", path=source)
    if (path / "cifar-10-batches-py").is_dir():
        return replace(data, source="cifar10", path=source)
    if path.is_dir() and next(image_paths(path), None) is not None:
        return replace(data, source="folder", path=source, labels_from_folders=labels)
    raise ConfigError(
        f"{name} must be {' or '.join(BUNDLED)}, an npz file, a folder of npz files or of images, "
        f"or the folder of cifar-10-batches-py, got {source}."
    )

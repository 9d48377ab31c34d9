"""What data a path holds."""

from dataclasses import replace
from pathlib import Path

from tdc_ray.config.data import DataConfig
from tdc_ray.data.sources.folder import IMAGE_SUFFIXES
from tdc_ray.errors import ConfigError


def data_config(source: str, data: DataConfig, name: str = "--data") -> DataConfig:
    """Return settings of the data that a path, or ``digits``, holds; the other settings stay.

    Args:
        source: The path, or ``digits``.
        data: Whose other settings are taken.
        name: Of the argument that named the source, for the error.

    Raises:
        ConfigError: The path holds no data of a known kind.
    """
    path = Path(source).expanduser()
    labels, data = data.labels_from_folders, replace(data, labels_from_folders=False)
    if source == "digits":
        return replace(data, source="digits", path=None)
    if path.suffix == ".npz" or (path.is_dir() and any(path.glob("*.npz"))):
        return replace(data, source="npz", path=source)
    if (path / "cifar-10-batches-py").is_dir():
        return replace(data, source="cifar10", path=source)
    if path.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        return replace(data, source="folder", path=source, labels_from_folders=labels)
    raise ConfigError(
        f"{name} must be digits, an npz file, a folder of npz files or of images, or the folder "
        f"of cifar-10-batches-py, got {source}."
    )

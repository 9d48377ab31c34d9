"""Which size and colours images have as they are stored."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from tdc_ray.config.data import BUNDLED, DataConfig
from tdc_ray.data.sources.image_file import stored_shape
from tdc_ray.data.sources.npz import npz_paths
from tdc_ray.data.sources.npz_files import open_npz
from tdc_ray.data.sources.walk import image_paths
from tdc_ray.errors import ConfigError, CorruptFileError, DataError

Shape = tuple[int, int, int]
"""``(C, H, W)`` of an image."""

MOST_TRIES = 100
"""Files of a folder that are tried for one that can be read."""

logger = logging.getLogger(__name__)


def stored_shapes(data: DataConfig) -> Iterator[tuple[str, Shape]]:
    """Yield every file of a source with the shape of its images, as they are stored.

    Raises:
        DataError: One cannot be read.
    """
    if data.path is None:
        yield data.source, BUNDLED[data.source]
        return
    path = Path(data.path)
    if data.source == "cifar10":
        yield data.path, (3, 32, 32)
    elif data.source == "npz":
        for file in npz_paths(path):
            height, width, channels = open_npz(file).image_shape
            yield str(file), (channels, height, width)
    else:
        for name in image_paths(path):
            yield str(path / name), stored_shape(path / name)


def first_shape(data: DataConfig) -> Shape | None:
    """Return the shape of a source's first images; None where none of the first can be read."""
    if data.source == "folder" and data.path is not None:
        folder = Path(data.path)
        with suppress(DataError):
            for name in islice(image_paths(folder), MOST_TRIES):
                with suppress(CorruptFileError):
                    return stored_shape(folder / name)
        return None
    with suppress(DataError):
        return next((shape for _, shape in stored_shapes(data)), None)
    return None


def check_given(data: DataConfig, *, has_size: bool, has_channels: bool) -> None:
    """Refuse images that the size and colours of a bundled source do not fit.

    Args:
        data: Images of people's own, with the shape of a bundled source where none was given.
        has_size: Whether the size was given.
        has_channels: Whether the number of channels was given.

    Raises:
        ConfigError: A shape that was not given does not fit.
    """
    if (shape := first_shape(data)) is None:
        return
    channels, height, width = shape
    size_fits = has_size or data.image_size == min(height, width)
    channels_fit = has_channels or data.num_channels == channels
    if not (size_fits and channels_fit):
        raise ConfigError(
            f"images in {data.path} are {_named(shape)}, and without flags that say so they "
            f"would be learnt as {_named(_learnt(data))}. Set --data.image-size "
            f"{min(height, width)} --data.num-channels {channels}, or what they are to be brought "
            "to, or name the --preset of images like them."
        )


def log_shape(data: DataConfig) -> None:
    """Log what size and colours images are brought to, where theirs are others."""
    found, learnt = first_shape(data), _learnt(data)
    if data.path is not None and found is not None and found != learnt:
        logger.info(
            "the first images in %s are %s; all are brought to %s",
            data.path,
            _named(found),
            _named(learnt),
        )


def _learnt(data: DataConfig) -> Shape:
    return (data.num_channels, data.image_size, data.image_size)


def _named(shape: Shape) -> str:
    """Write a shape in words."""
    channels, height, width = shape
    return f"{height}x{width} in {'grey' if channels == 1 else 'colour'}"

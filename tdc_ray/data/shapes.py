"""Which size and colours images have as they are stored."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from tdc_ray.config.data import BASE_SAMPLES, BUNDLED, DataConfig
from tdc_ray.data.load import ENCODED
from tdc_ray.data.sources.image_file import stored_shape
from tdc_ray.data.sources.npz import npz_paths
from tdc_ray.data.sources.npz_files import open_npz
from tdc_ray.data.summary import Shape, shape_text
from tdc_ray.errors import ConfigError, CorruptFileError, DataError

MOST_TRIES = 100
"""Files of a folder that are tried for one that can be read."""


def stored_shapes(data: DataConfig) -> Iterator[tuple[str, Shape]]:
    """Yield every file of a source with the shape of its images, as they are stored.

    Raises:
        DataError: One cannot be read.
    """
    if data.source == BASE_SAMPLES:
        yield data.source, data.shape
        return
    if data.path is None:
        yield data.source, BUNDLED[data.source]
        return
    if data.source == "cifar10":
        yield data.path, (3, 32, 32)
    elif data.source == "npz":
        for file in npz_paths(Path(data.path)):
            height, width, channels = open_npz(file).image_shape
            yield str(file), (channels, height, width)
    else:
        images = ENCODED[data.source](data)
        for index in range(len(images)):
            encoded = images.encoded(index)
            yield str(encoded), stored_shape(encoded)


def first_shape(data: DataConfig) -> Shape | None:
    """Return the shape of a source's first images; None where none of the first can be read."""
    with suppress(DataError):
        if data.source not in ENCODED:
            return next((shape for _, shape in stored_shapes(data)), None)
        images = ENCODED[data.source](data)
        for index in islice(range(len(images)), MOST_TRIES):
            with suppress(CorruptFileError):
                return stored_shape(images.encoded(index))
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
            f"the first image in {data.path} is {shape_text(shape)}, and without flags images "
            f"would be learnt as {shape_text(data.shape)}. Set --data.image-size "
            f"{min(height, width)} --data.num-channels {channels}, or what they are to be brought "
            f"to, or give --data {data.path} without a preset, which finds it out."
        )

"""What images of one's own are, and what is done to them before they are learnt.

Headers are read, pixels are not: what is only found damaged when it is decoded is counted then.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tdc_ray.config.data import BASE_SAMPLES, DataConfig
from tdc_ray.data.dataset import ImageDataset
from tdc_ray.data.load import ENCODED, load_dataset
from tdc_ray.data.pixels import covering_size
from tdc_ray.data.shapes import stored_shapes
from tdc_ray.data.sources.encoded import MAX_NAMED, EncodedImages, corrupt_advice
from tdc_ray.data.sources.image_file import Header, read_header
from tdc_ray.data.sources.walk import OTHER_SPLITS, TRAIN, subfolders
from tdc_ray.data.summary import ImagesSummary, Shape, summary_lines
from tdc_ray.errors import CorruptFileError
from tdc_ray.storage.object_store import resolve_path

MOST_HEADERS = 10_000
"""Images that are looked at, evenly spread; of more it is said how many were."""

ALIKE = 0.9
"""Share of the images that decides about the shape of all."""

ASPECT_TOLERANCE = math.log(1.05)
"""How far images' width over height may be from one that they have in common, as a logarithm."""

LARGEST_ALIKE, LARGEST_MIXED = 256, 64
"""Most pixels a side of images that stay as they are, and of those brought to one size."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """Images as they are stored."""

    num_images: int
    num_classes: int | None
    """None unless all images have a label."""

    left_out: Mapping[str, int]
    """Files that are no images of the dataset, by the reason."""

    unreadable: tuple[str, ...]
    """Those of the images that are looked at that are no readable images."""

    headers: Mapping[Header, int]
    """How many of the images that are looked at have which header."""

    @property
    def num_looked_at(self) -> int:
        """How many images were looked at."""
        return sum(self.headers.values()) + len(self.unreadable)


def survey(data: DataConfig) -> Survey:
    """Look at the headers of images as they are now; :func:`images_summary` takes it from here.

    Raises:
        DataError: The data is missing or malformed.
    """
    cached_survey.cache_clear()
    return cached_survey(_as_stored(data))


@functools.lru_cache(maxsize=1)  # of encoded images it opens every file
def cached_survey(data: DataConfig) -> Survey:
    """Look at the headers of images."""
    if data.source in ENCODED:
        return _survey_encoded(ENCODED[data.source](data))
    return _survey_arrays(data, load_dataset(data))


def _as_stored(data: DataConfig) -> DataConfig:
    """Return settings that are equal for the same encoded images, whatever is done to them."""
    if data.source not in ENCODED or data.path is None:
        return data
    return DataConfig(
        source=data.source,
        path=data.path if data.is_on_hub else str(resolve_path(data.path).resolve()),
        labels_from_folders=data.labels_from_folders,
        cache_dir=data.cache_dir,
    )


def _survey_encoded(images: EncodedImages) -> Survey:
    """Look at the headers of encoded images; of more than ``MOST_HEADERS`` of some."""
    headers, unreadable = Counter[Header](), []
    for index in images.spread(MOST_HEADERS):
        header = read_header(images.encoded(index))
        if header is None:
            unreadable.append(images.name(index))
        else:
            headers[header] += 1
    left_out = dict(images.left_out)
    if images.config.source == "folder" and (others := _other_splits(images.root)):
        left_out[f"folders of other splits than train ({', '.join(others)})"] = len(others)
    return Survey(
        num_images=len(images),
        num_classes=images.num_classes,
        left_out=left_out,
        unreadable=tuple(unreadable),
        headers=headers,
    )


def _survey_arrays(data: DataConfig, dataset: ImageDataset) -> Survey:
    """Describe images that all have the shape of the first, being arrays."""
    _, (channels, height, width) = next(stored_shapes(data))
    header = Header(
        height=height,
        width=width,
        is_grey=channels == 1,
        is_deep=False,
        is_deep_colour=False,
        is_rgb=True,
        is_turned=False,
        is_transparent=False,
        is_animated=False,
    )
    return Survey(
        num_images=len(dataset),
        num_classes=dataset.num_classes,
        left_out={},
        unreadable=(),
        headers={header: len(dataset)},
    )


def _summarize(found: Survey, data: DataConfig) -> ImagesSummary:
    """Count what bringing images to the shape asked for does to them."""
    changed, shape = Counter[str](), data.shape
    for header, count in found.headers.items():
        for change, is_done in _changes(header, shape).items():
            changed[change] += count * is_done
    return ImagesSummary(
        source=data.source,
        num_images=found.num_images,
        num_classes=found.num_classes,
        shape=shape,
        hub=data.path if data.is_on_hub else None,
        left_out=dict(found.left_out),
        num_looked_at=found.num_looked_at,
        changed={change: count for change, count in changed.items() if count},
        num_unreadable=len(found.unreadable),
        unreadable=found.unreadable[:MAX_NAMED],
    )


@functools.lru_cache(maxsize=4)  # checks, the log and the results of a run ask
def images_summary(data: DataConfig) -> ImagesSummary:
    """Return which images of a dataset are taken, and what is done to them.

    Raises:
        DataError: The data is missing or malformed, or more of the images that are looked at are
            unreadable than may be.
    """
    load_dataset(data)  # refuses what headers do not tell
    found = cached_survey(_as_stored(data))
    if len(found.unreadable) > data.max_corrupt:
        raise CorruptFileError(
            f"{found.unreadable[0]} is no readable image. {corrupt_advice(data, found.unreadable)}"
        )
    return _summarize(found, data)


def log_summary(data: DataConfig) -> None:
    """Log which images are taken, why others are not, and what is done to them.

    Raises:
        DataError: The data is missing or malformed.
    """
    is_drawn = data.source == BASE_SAMPLES  # of what the drawing says
    if data.path is None and (is_drawn or not images_summary(data).changed):
        return  # a bundled source as it is
    for line in summary_lines(data.path or data.source, images_summary(data)):
        logger.info("%s", line)


def _changes(header: Header, shape: Shape) -> dict[str, bool]:
    """Return what may be done to an image, in the order in which it is done, and whether it is."""
    channels, height, width = shape
    stored = (header.height, header.width)
    covering = covering_size(stored, (height, width))
    return {
        "turned upright": header.is_turned,
        "the first of several pictures": header.is_animated,
        "scaled to 8 bits": header.is_deep or header.is_deep_colour,
        "converted to RGB": channels == 3 and not header.is_rgb,
        "put on white": header.is_transparent,
        "made grey": channels == 1 and not header.is_grey,
        "grey made colour": channels == 3 and header.is_grey,
        "enlarged": covering > stored,
        "reduced": covering < stored,
        "cropped to the middle": covering != (height, width),
    }


def fitting_shape(found: Survey) -> Shape | None:
    """Return the shape to learn images in; None where no image can be read.

    It is that of nine images in ten, if they are alike and of at most ``LARGEST_ALIKE`` pixels a
    side; otherwise one of their aspect, or a square if nine in ten have none in common, that nine
    in ten are at least as large as, of at most ``LARGEST_MIXED`` pixels a side. Sides are rounded
    down to what a UNet can halve. Grey if all images are.
    """
    if not found.headers:
        return None
    channels = 1 if all(header.is_grey for header in found.headers) else 3
    sizes = Counter[tuple[int, int]]()
    for header, count in found.headers.items():
        sizes[header.height, header.width] += count
    (height, width), count = sizes.most_common(1)[0]
    if count < ALIKE * sizes.total() or max(height, width) > LARGEST_ALIKE:
        height, width = _size_of_mixed(sizes)
    # A UNet halves both sides until the shorter one is at most 16.
    factor = max(2, 1 << math.ceil(math.log2(max(min(height, width), 16) / 16)))
    return (channels, max(8, height // factor * factor), max(8, width // factor * factor))


def _size_of_mixed(sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    """Return height and width that images of several sizes, or large ones, are brought to."""
    aspects = [width / height for height, width in sizes.elements()]
    shared = (one for one in (1.0, median(aspects)) if _are_alike(aspects, one))
    aspect = next(shared, 1.0)
    widths = sorted(min(width, height * aspect) for height, width in sizes.elements())
    width = widths[math.floor((1 - ALIKE) * (len(widths) - 1))]
    width *= min(1, LARGEST_MIXED / max(width, width / aspect))
    return (round(width / aspect), round(width))


def _are_alike(aspects: Sequence[float], aspect: float) -> bool:
    alike = [abs(math.log(one / aspect)) <= ASPECT_TOLERANCE for one in aspects]
    return sum(alike) >= ALIKE * len(alike)


def _other_splits(root: Path) -> list[str]:
    """Return the names of a data set's other parts beside the folder to train on."""
    if root.name.lower() not in TRAIN:
        return []
    return [name for name in subfolders(root.parent) if name.lower() in OTHER_SPLITS]

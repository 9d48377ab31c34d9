"""Sampled images as small pictures that a page carries within itself."""

import base64
import io
from collections.abc import Mapping

import numpy as np
from PIL import Image

from tdc_ray.reporting.html.blocks import Samples
from tdc_ray.reporting.html.load import Pixels
from tdc_ray.reporting.models import LONGER_BASE

SMALL = 64
"""Images up to this size are kept as they are, as PNG; larger ones as JPEG."""

MAX_PIXELS = 512
"""About the width of a grid."""

MAX_COLUMNS = 8

REAL = "training images"

_TITLES = {"base": "base", "tdc": "experts (TDC)", "longer-base": LONGER_BASE}


def samples_block(samples: Mapping[str, Pixels], real: Pixels | None = None) -> Samples:
    """Return a grid of the images of each model, in the same order, and one of real images."""
    is_pair = len(samples) > 1
    caption = ""
    if real is not None:
        samples = {**samples, REAL: real}
        caption = " Training images are drawn at random."
    size = max(max(images.shape[1:3]) for images in samples.values())
    columns = max(2, min(MAX_COLUMNS, MAX_PIXELS // size))
    columns = min(columns, max(1, int(min(map(len, samples.values())) ** 0.5)))
    return Samples(
        grids=[
            (_TITLES.get(name, name), _data_uri(images[: columns**2], columns))
            for name, images in samples.items()
        ],
        is_small=size <= SMALL,
        title="Samples, place by place from the same noise" if is_pair else "Samples",
        caption=f"The first {columns**2} of each model's images, unselected.{caption}",
    )


def _data_uri(images: Pixels, columns: int) -> str:
    """Return images row by row, with a transparent gap where the format has one."""
    count, height, width, _ = images.shape
    gap = 1 if max(height, width) <= SMALL else 0
    rows = -(-count // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 4)
    grid = np.zeros(shape, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        grid[top : top + height, left : left + width, :3] = image  # one channel becomes three
        grid[top : top + height, left : left + width, 3] = 255
    file = io.BytesIO()
    picture, kind = Image.fromarray(grid), "png" if gap else "jpeg"
    if gap:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.convert("RGB").save(file, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"

"""Images side by side, as large as eyes need."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdc_ray.storage.files import atomic_path

LEAST_SIDE = 512
"""Pixels of the longer side of a grid, at least."""

GAP = 1
"""Grey pixels around each image."""


def image_grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay images out as a square, row by row; each pixel of tiny ones becomes a square of some.

    Args:
        images: ``(N, H, W, C)``, at least one.

    Returns:
        ``(H', W', C)``, the longer side of at least :data:`LEAST_SIDE` pixels.
    """
    count, height, width, channels = images.shape
    columns = max(1, round(count**0.5))
    rows = -(-count // columns)
    factor = max(1, -(-LEAST_SIDE // max(columns * width, rows * height)))
    larger = images.repeat(factor, axis=1).repeat(factor, axis=2)
    around = (GAP, GAP)
    cells = np.pad(larger, ((0, 0), around, around, (0, 0)), constant_values=128)
    cells = np.pad(cells, ((0, rows * columns - count), (0, 0), (0, 0), (0, 0)))
    by_row = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    return by_row.reshape(rows * cells.shape[1], columns * cells.shape[2], channels)


def save_grid(images: NDArray[np.uint8], path: Path) -> None:
    """Write images, ``(N, H, W, C)``, side by side as a PNG file.

    Raises:
        StorageFailedError: The disk or the store does not take it.
    """
    grid = image_grid(images)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(file, "png")

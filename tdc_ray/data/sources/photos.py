"""scikit-learn's two photographs in colour, a temple and a flower, cut into squares of 16 x 16."""

import numpy as np
import torch

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ArrayImages
from tdc_ray.data.pixels import resize_all

SIZE, STRIDE = 16, 8
"""Height and width of a square, and how far the next one lies, in pixels: each overlaps its
neighbours by half, so that held-out squares show pixels that training squares show too."""

NUM_BANDS = 3
"""A square's class is its photograph and which of so many bands, from the top, it lies in."""


def open(config: DataConfig) -> ArrayImages:
    """Load the squares: 8,216 of six classes."""
    from sklearn.datasets import load_sample_images  # a second's import, as of the digits

    squares, labels = [], []
    for number, photo in enumerate(load_sample_images().images):  # (427, 640, 3), uint8
        windows = np.lib.stride_tricks.sliding_window_view(photo, (SIZE, SIZE), axis=(0, 1))
        windows = windows[::STRIDE, ::STRIDE].transpose(0, 1, 3, 4, 2)
        rows, columns = windows.shape[:2]
        squares.append(windows.reshape(-1, SIZE, SIZE, 3))
        bands = np.arange(rows) * NUM_BANDS // rows
        labels.append(np.repeat(number * NUM_BANDS + bands, columns))
    return ArrayImages(
        resize_all(np.concatenate(squares), config), torch.from_numpy(np.concatenate(labels))
    )

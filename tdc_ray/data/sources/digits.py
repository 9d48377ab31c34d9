"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8, within the package."""

import numpy as np
import torch

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ArrayImages
from tdc_ray.data.pixels import resize_all


def open(config: DataConfig) -> ArrayImages:
    """Load the digits."""
    from sklearn.datasets import load_digits  # a second's import that other sources do not need

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    return ArrayImages(resize_all(pixels, config), torch.from_numpy(digits.target))

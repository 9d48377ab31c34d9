"""Images and datasets for the tests."""

import numpy as np
import torch

from tdc_ray.config.data import DataConfig


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def npz_config(path, *, image_size=8, num_channels=1, **settings):
    shape = {"image_size": image_size, "num_channels": num_channels}
    return DataConfig(source="npz", path=str(path), **shape, **settings)


def folder_config(path, *, image_size=8, num_channels=3, **settings):
    shape = {"image_size": image_size, "num_channels": num_channels}
    return DataConfig(source="folder", path=str(path), **shape, **settings)


def everything(dataset):
    """All images as (N, H, W, C), and all labels."""
    images, labels = dataset.__getitems__(range(len(dataset)))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    return images.permute(0, 2, 3, 1).numpy(), labels.tolist()

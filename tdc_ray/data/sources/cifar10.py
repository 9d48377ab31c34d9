"""CIFAR-10's training images, as torchvision unpacks them."""

import torch

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ArrayImages
from tdc_ray.data.pixels import resize_all
from tdc_ray.errors import DataError


def open(config: DataConfig) -> ArrayImages:
    """Load the training images.

    Raises:
        DataError: They are not below the path, or are damaged.
    """
    from torchvision.datasets import CIFAR10

    try:  # the files are pickles: torchvision checks their MD5 before it opens them
        cifar = CIFAR10(str(config.path), train=True, download=False)
    except RuntimeError as error:
        raise DataError(
            f"data.path {config.path} holds no CIFAR-10: expected {config.path}/"
            f"cifar-10-batches-py as torchvision unpacks it. {error}"
        ) from error
    return ArrayImages(resize_all(cifar.data, config), torch.tensor(cifar.targets))

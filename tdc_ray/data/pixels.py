"""uint8 pixels of any size and colours, brought to the shape that is asked for."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from tdc_ray.config.data import DataConfig

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""Share of red, green and blue in grey (ITU-R BT.601, as in PIL)."""


def channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    """Convert ``(N, H, W)`` or ``(N, H, W, C)`` into ``(N, C, H, W)``."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def to_size(images: Tensor, config: DataConfig) -> Tensor:
    """Resize uint8 images to the size (shorter side, then a square from the middle) and colours.

    Args:
        images: ``(N, C, H, W)``, of 1 or 3 channels.
        config: The size and the number of channels.

    Returns:
        ``(N, config.num_channels, config.image_size, config.image_size)``.
    """
    channels, size = images.shape[1], config.image_size
    if channels == 3 and config.num_channels == 1:
        weights = torch.tensor(GREY_WEIGHTS)[:, None, None]
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    elif channels == 1 and config.num_channels == 3:
        images = images.expand(-1, 3, -1, -1).contiguous()
    if images.shape[-2:] != (size, size):
        bicubic = transforms.InterpolationMode.BICUBIC
        images = transforms.resize(images, [size], interpolation=bicubic, antialias=True)
        images = transforms.center_crop(images, [size, size])
    return images


def resize_all(
    pixels: NDArray[np.uint8],
    config: DataConfig,
    to_tensor: Callable[[NDArray[np.uint8]], Tensor] = channels_first,
) -> Tensor:
    """Resize an array of images, some at a time so that copies need bounded memory."""
    starts = range(0, len(pixels), 4096)
    return torch.cat(
        [to_size(to_tensor(pixels[start : start + 4096]), config) for start in starts]
    )

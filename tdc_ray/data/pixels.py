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


def covering_size(stored: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the least height and width of an image's own aspect that cover others.

    Args:
        stored: Height and width of the image.
        size: Those to cover, of which one is met exactly.
    """
    (stored_height, stored_width), (height, width) = stored, size
    if height * stored_width >= width * stored_height:
        return (height, int(height * stored_width / stored_height))
    return (int(width * stored_height / stored_width), width)


def to_size(images: Tensor, config: DataConfig) -> Tensor:
    """Bring uint8 images to size and colours: resized to cover the size, cropped to the middle.

    Args:
        images: ``(N, C, H, W)``, of 1 or 3 channels.
        config: The size and the number of channels.

    Returns:
        ``(N, *config.shape)``.
    """
    channels, size = images.shape[1], (config.height, config.width)
    if channels == 3 and config.num_channels == 1:
        weights = torch.tensor(GREY_WEIGHTS)[:, None, None]
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    elif channels == 1 and config.num_channels == 3:
        images = images.expand(-1, 3, -1, -1).contiguous()
    height, width = images.shape[-2:]
    if (height, width) != size:
        bicubic = transforms.InterpolationMode.BICUBIC
        covering = covering_size((height, width), size)
        images = transforms.resize(images, [*covering], interpolation=bicubic, antialias=True)
        images = transforms.center_crop(images, [*size])
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

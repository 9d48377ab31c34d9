"""The family of UNets that ``--model.architecture auto`` chooses from.

The shorter side of the images, or of their latents, gives the levels; the number of images times
their channels gives the channels of the first level, and, in brackets, about how many million
parameters there are:

====  =======================  ============  ============  ============
side  channels of the levels,  few: below    some          many: from
      by those of the first    30,000                      100,000
====  =======================  ============  ============  ============
8     1 2                      32 (1.08)     32 (1.08)     64 (4.3)
16    1 2                      16 (0.19)     32 (1.08)     64 (4.3)
32    1 2 2 2                  32 (2.6)      64 (10.3)     128 (40.9)
64    1 2 3 4                  32 (5.8)      64 (23.0)     128 (92.0)
128   1 1 2 3 4                32 (6.0)      64 (23.8)     128 (95.0)
256   1 1 2 2 4 4              32 (7.8)      64 (31.1)     128 (124.1)
====  =======================  ============  ============  ============

Every level has two residual blocks, few images of 16x16 one. Other sides take the row that is
nearest by ratio, and as many of its levels as both sides can be halved for. Attention is where the
shorter side is at most 16, below the first level, and in the middle. So few grey images of 8x8
have the architecture ``digits``, few of 16x16 in colour ``photos16``; those of 32x32 lie about
``mnist32`` (1.7) and ``ddpm-cifar10`` (35.7), and many of 256x256 have the channels of
``ddpm-ffhq256`` (113.7).

Where ``--hours`` has no room to train that one, a run takes one of a half or a quarter of the
channels, or of one residual block (``runs.choices.with_smaller_network``).
"""

import math
from collections.abc import Mapping

from tdc_ray.errors import ConfigError
from tdc_ray.models.network_config import NetworkConfig, sample_size
from tdc_ray.models.unet2d.architectures import ATTN_DOWN, ATTN_UP, DOWN, UP, iddpm_unet

FEW, MANY = 30_000, 100_000
"""Numbers of images, times their channels, below which they are few, and from which many."""

LEVELS: Mapping[int, tuple[int, ...]] = {
    8: (1, 2),
    16: (1, 2),
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}
"""By the side of the images: channels of every level, as multiples of the first one's."""

CHANNELS: Mapping[int, tuple[int, int, int]] = {8: (32, 32, 64), 16: (16, 32, 64)}
"""By the side: channels of the first level for few, some and many images, if not the usual."""

USUAL_CHANNELS = (32, 64, 128)

LEAST_CHANNELS = 16
"""Channels of the first level: two for each GroupNorm group."""

LARGEST_ATTENTION = 16
"""Largest side at which there is attention, and largest that the last level may have."""

LARGEST_SIDE = 512
"""Shortest side may be that long: the last level is then 16 wide or high."""


def auto_unet(
    *,
    height: int,
    width: int,
    channels: int,
    num_images: int,
    learned_sigma: bool = False,
    scale: float = 1.0,
    depth: int | None = None,
) -> NetworkConfig:
    """Return the UNet of the family for some images, or their latents.

    Args:
        height: Of an image, in pixels.
        width: Likewise.
        channels: Of an image.
        num_images: How many there are to learn.
        learned_sigma: Whether a variance is predicted, too.
        scale: Factor of the channels of all levels.
        depth: Residual blocks per level; None means those of the family.

    Raises:
        ConfigError: The sides cannot be halved often enough, or too few channels are left.
    """
    side = min(height, width)
    row = min(LEVELS, key=lambda known: (abs(math.log(side / known)), known))
    multiples = LEVELS[row][: _num_levels(height, width, len(LEVELS[row]))]
    size = _size_of(num_images * channels)
    usual = CHANNELS.get(row, USUAL_CHANNELS)[size]
    first, num_groups = _rounded(usual * scale)
    if first < LEAST_CHANNELS:
        raise ConfigError(
            f"model.width must be at least {LEAST_CHANNELS / usual:g} for {num_images} images of "
            f"{height}x{width}, whose first level has {usual} channels and needs "
            f"{LEAST_CHANNELS}, got {scale:g}."
        )
    if depth is None:
        depth = 1 if row == 16 and size == 0 else 2
    attends = [index > 0 and side >> index <= LARGEST_ATTENTION for index in range(len(multiples))]
    return iddpm_unet(
        sample_size=sample_size(height, width),
        in_channels=channels,
        out_channels=channels * (2 if learned_sigma else 1),
        layers_per_block=depth,
        block_out_channels=[first * multiple for multiple in multiples],
        down_block_types=[ATTN_DOWN if has else DOWN for has in attends],
        up_block_types=[ATTN_UP if has else UP for has in reversed(attends)],
        attention_head_dim=first if first < 32 else first // 2,
        norm_num_groups=num_groups,
        attn_norm_num_groups=num_groups,
    )


def _size_of(planes: int) -> int:
    """Return 0 for few images, 1 for some, 2 for many, by their number times their channels."""
    return (planes >= FEW) + (planes >= MANY)


def _rounded(channels: float) -> tuple[int, int]:
    """Return channels of the first level that GroupNorm's groups divide, and these groups.

    A group is what pruning takes away at a time: at least four channels of a wide first level.
    """
    num_groups = next(number for number in (32, 16, 8) if channels >= 4 * number or number == 8)
    return round(channels / num_groups) * num_groups, num_groups


def _num_levels(height: int, width: int, most: int) -> int:
    """Return how many levels there can be: each but the first halves both sides.

    Raises:
        ConfigError: The last level would be too large for attention to reach across.
    """
    levels = 1
    while levels < most and height % 2**levels == 0 and width % 2**levels == 0:
        levels += 1
    side = min(height, width)
    if side >> (levels - 1) <= LARGEST_ATTENTION:
        return levels
    if side > LARGEST_SIDE:
        raise ConfigError(
            f"data.image_size must be at most {LARGEST_SIDE} with model.architecture auto, got "
            f"{height}x{width}. Learn latents (--data.first-stage), or name a --model.config."
        )
    factor = 2 ** math.ceil(math.log2(side / LARGEST_ATTENTION))
    odd = next(length for length in (height, width) if length % factor)
    below = odd // factor * factor
    raise ConfigError(
        f"data.image_size must give sides that are multiples of {factor} with model.architecture "
        f"auto, whose last level is at most {LARGEST_ATTENTION} wide or high, got "
        f"{height}x{width}: {below} and {below + factor} are nearest."
    )

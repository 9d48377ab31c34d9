"""Winograd's convolution: 3 x 3 filters with a quarter of the multiplications, on CPUs.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308), F(4 x 4,
3 x 3): 4 x 4 outputs from every tile of 6 x 6 pixels. cuDNN chooses it by itself; oneDNN, by which
PyTorch convolves on CPUs, has none for x86, and NNPACK's was slower here than oneDNN's direct
convolution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LEAST_CHANNELS = 32
"""Least channels of input and output; with fewer, the transforms cost what the products save."""

LEAST_TILES = 64
"""Least tiles of all images; with fewer, the filters' transform costs what the products save."""

LEAST_PIXELS = 8
"""Least output pixels per tile, of 16; with fewer, less than half of the products is saved."""

BYTES_AT_ONCE = 2**22
"""Bytes of the tiles of a chunk (images, or rows of one), so that they stay in the cache from
their transform to their product."""

_OF_TILES = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_OF_FILTERS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OF_PRODUCTS = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def _in_two_dimensions(matrix: Sequence[Sequence[float]]) -> Tensor:
    """Return the matrix that transforms rows and columns of a flattened tile at once."""
    exact = torch.tensor(matrix, dtype=torch.float64, device="cpu")
    return torch.kron(exact, exact).float()


OF_TILES = _in_two_dimensions(_OF_TILES)  # (36, 36)
OF_FILTERS = _in_two_dimensions(_OF_FILTERS)  # (36, 9)
OF_PRODUCTS = _in_two_dimensions(_OF_PRODUCTS)  # (16, 36)


class WinogradConvolutions(TorchFunctionMode):
    """Compute 3 x 3 convolutions that gain by it by Winograd's algorithm, within the context.

    These are of float32 on CPUs, without gradients and autocast. The output differs from the
    direct convolution's by some 1e-5 of the largest value.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute a suitable convolution here; pass any other call on."""
        if func is functional.conv2d and len(args) == 7 and _gains(*args):  # as nn.Conv2d calls it
            return convolution(*args[:3])
        return func(*args, **(kwargs or {}))


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve with 3 x 3 filters, stride 1 and one pixel of zeros around.

    Args:
        x: ``(B, C, H, W)``; fastest in the memory format channels last.
        weight: ``(D, C, 3, 3)``.
        bias: ``(D,)``.

    Returns:
        ``(B, D, H, W)``, in memory with the channels last.
    """
    (count, channels, height, width), outputs = x.shape, len(weight)
    rows, columns = -(-height // 4), -(-width // 4)
    filters = (OF_FILTERS @ weight.reshape(-1, 9).T).view(36, outputs, channels).mT
    bytes_of_row = 4 * 36 * columns * max(channels, outputs)
    num_rows = min(rows, max(1, BYTES_AT_ONCE // bytes_of_row))
    size = min(count, max(1, BYTES_AT_ONCE // (bytes_of_row * rows)))
    padded = x.new_zeros(size, 4 * rows + 2, 4 * columns + 2, channels)
    y = x.new_empty(count, rows, 4, columns, 4, outputs)
    for first in range(0, count, size):
        chunk = x[first : first + size].permute(0, 2, 3, 1)
        padded[: len(chunk), 1 : height + 1, 1 : width + 1] = chunk
        windows = padded[: len(chunk)].unfold(1, 6, 4).unfold(2, 6, 4)
        for row in range(0, rows, num_rows):
            tiles = windows[:, row : row + num_rows]  # (b, rows, columns, C, 6, 6)
            tiles = tiles.permute(0, 1, 2, 4, 5, 3).reshape(-1, 36, channels)
            tiles = _times(OF_TILES, tiles)
            products = tiles.transpose(0, 1) @ filters  # (36, tiles, D)
            pixels = _times(OF_PRODUCTS, products.transpose(0, 1))  # (tiles, 16, D)
            out = y[first : first + size, row : row + num_rows].transpose(2, 3)
            torch.add(pixels.view(out.shape), bias, out=out)
    whole = y.view(count, 4 * rows, 4 * columns, outputs)
    return whole[:, :height, :width].permute(0, 3, 1, 2)


def _times(transform: Tensor, parts: Tensor) -> Tensor:
    """Multiply each part, ``(P, S, C)``, from the left with ``(R, S)``: ``(P, R, C)``."""
    return torch.bmm(transform.expand(len(parts), *transform.shape), parts)


def _gains(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> bool:
    """Whether :func:`convolution` can compute a convolution, and does it faster."""
    kind = weight.shape[2:], stride, padding, dilation, groups
    if kind != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or bias is None or x.ndim != 4:
        return False
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    pixels = len(x) * x.shape[2] * x.shape[3]
    tiles = len(x) * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    wide = min(weight.shape[:2]) >= LEAST_CHANNELS
    return wide and tiles >= LEAST_TILES and pixels >= LEAST_PIXELS * tiles

"""Ridge least squares for the weights of a layer, from statistics that are added up in blocks."""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

RIDGE = 1e-4
"""Ridge, in units of the mean variance of the inputs; 1e-6 to 1e-3 gave the same losses to three
digits on the digits base, 1e-2 higher ones."""

ROWS_PER_UNKNOWN = 128
"""Rows that suffice for the weights of one output; more are left out. With 32 the increase of the
loss was half as high again on the digits base."""

NUM_BLOCKS, MIN_BLOCK = 8, 64
"""Blocks of rows that the Gram matrix is computed in, and the fewest rows of one."""

FLOATS_PER_BLOCK = 2**24
"""Most input values of the images of one block (64 MiB)."""

ReadLayer = nn.Conv2d | nn.Linear


class ActivationHook:
    """Keeps the last input and output of a layer, within the context."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.input, self.output = torch.empty(0), torch.empty(0)

    def __enter__(self) -> "ActivationHook":
        self._handle = self.layer.register_forward_hook(self._keep)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.remove()

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.input, self.output = inputs[0], output


class LeastSquares:
    """Normal equations of ``outputs = weights @ inputs + bias`` for one layer, in float64.

    Without a bias if the layer has none.
    """

    def __init__(self, layer: ReadLayer, *, num_rows: int, seed: int) -> None:
        """Start without rows.

        Args:
            layer: The layer whose weights are sought.
            num_rows: Rows that will be available; if they are more than enough, only some
                positions of every image count.
            seed: Decides which positions.
        """
        self.layer = layer
        outputs, inputs = layer.weight.flatten(1).shape
        self._share = min(1.0, ROWS_PER_UNKNOWN * inputs / num_rows)
        self._generator = torch.Generator().manual_seed(seed)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=layer.weight.device)

        # Inputs are centred by the mean of the first block: for inputs that hardly vary, far from
        # zero, sums of float32 squares would lose the variance.
        self._origin = layer.weight.new_zeros(inputs)
        self._gram, self._cross = zeros(inputs, inputs), zeros(inputs, outputs)
        size = max(MIN_BLOCK, -(-inputs // NUM_BLOCKS))
        starts = range(0, inputs, size)
        self._blocks = [slice(start, min(start + size, inputs)) for start in starts]
        self._inputs, self._outputs = zeros(inputs), zeros(outputs)
        self._count, self._num_rows = 0.0, 0

    def add(self, inputs: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        """Add the rows of a batch.

        Args:
            inputs: Inputs of the layer: ``(B, C, H, W)``, or ``(B, N, C)`` if it is linear.
            outputs: The target outputs: ``(B, M, H', W')`` or ``(B, N, M)``.
            weights: Weight of every image's squared error, ``(B,)``; None means 1.
        """
        if weights is None:
            weights = inputs.new_ones(len(inputs))
        if outputs.ndim == 4:
            outputs = outputs.flatten(2).transpose(1, 2)  # (B, M, H', W') -> (B, N, M)
        num_positions = outputs.shape[1]
        drawn = torch.randperm(num_positions, generator=self._generator)
        positions = drawn[: max(1, round(self._share * num_positions))].to(inputs.device)
        size = max(1, FLOATS_PER_BLOCK // (len(positions) * len(self._gram)))
        for first in range(0, len(inputs), size):
            part = slice(first, first + size)
            rows = _rows(self.layer, inputs[part], positions)
            targets = outputs[part][:, positions].flatten(0, 1)
            if self._num_rows == 0 and self.layer.bias is not None:
                self._origin = rows.mean(0)
            rows -= self._origin
            counts = (
                weights[part, None].expand(-1, len(positions)).reshape(-1, 1)
            )  # (B * positions, 1)
            weighted = rows * counts
            for block in self._blocks:  # the matrix is symmetric: its upper triangle alone
                upper = weighted[:, block].T @ rows[:, block.start :]
                self._gram[block, block.start :] += upper.double()
            self._cross += (weighted.T @ targets).double()
            self._inputs += weighted.sum(0, dtype=torch.float64)
            self._outputs += (targets * counts).sum(0, dtype=torch.float64)
            self._count += float(counts.double().sum())
            self._num_rows += len(rows)

    @property
    def macs(self) -> int:
        """Macs of the statistics."""
        size = len(self._gram)
        products = sum((block.stop - block.start) * (size - block.start) for block in self._blocks)
        return self._num_rows * (products + size * self._cross.shape[1])

    def normal(self) -> tuple[Tensor, Tensor]:
        """Return both sides of the normal equations, ``(n, n)`` and ``(n, m)``, without the bias.

        The ridge pulls the weights towards those that the layer has.
        """
        mean = self._mean
        upper = self._gram.triu()
        gram = (upper + upper.triu(1).T) / self._count - torch.outer(mean, mean)
        cross = self._cross / self._count - torch.outer(mean, self._outputs / self._count)
        ridge = RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        gram.diagonal().add_(ridge)
        return gram, cross + ridge * layer_matrix(self.layer)

    @property
    def _mean(self) -> Tensor:
        """What the inputs are centred by, beside the origin: their mean, or 0 without a bias."""
        return self._inputs / self._count * (self.layer.bias is not None)

    def solve(self, columns: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Solve for weights, in the layer's shape, and bias; None if the layer has none.

        Args:
            columns: The inputs to solve with; the weights of the others are 0. None means all.
        """
        gram, cross = self.normal()
        if columns is None:
            columns = torch.arange(len(gram), device=gram.device)
        factor = torch.linalg.cholesky(gram[columns][:, columns])
        weights = torch.zeros_like(cross)
        weights[columns] = torch.cholesky_solve(cross[columns], factor)
        shape, dtype = self.layer.weight.shape, self.layer.weight.dtype
        bias = None
        if self.layer.bias is not None:
            mean = self._mean + self._origin.double()
            bias = (self._outputs / self._count - mean @ weights).to(dtype)
        return weights.T.reshape(shape).to(dtype), bias


def layer_matrix(layer: ReadLayer) -> Tensor:
    """Return a layer's weights as ``(n, m)``, float64: a row for every input, or kernel tap."""
    return layer.weight.detach().flatten(1).T.double()


def _rows(layer: ReadLayer, inputs: Tensor, positions: Tensor) -> Tensor:
    """Return the layer's inputs at some positions of its output: ``(B * positions, n)``."""
    if isinstance(layer, nn.Linear):
        return inputs[:, positions].flatten(0, 1)
    (height, width), (down, right) = layer.kernel_size, layer.stride
    assert isinstance(layer.padding, tuple)
    pad_down, pad_right = layer.padding
    padded = functional.pad(inputs, (pad_right, pad_right, pad_down, pad_down))
    columns = (padded.shape[-1] - width) // right + 1
    rows, cols = positions // columns * down, positions % columns * right
    taps = [padded[:, :, rows + i, cols + j] for i in range(height) for j in range(width)]
    # (B, C, P) for every tap -> (B, P, C, taps) -> (B * P, C * taps)
    return torch.stack(taps, dim=-1).transpose(1, 2).flatten(2).flatten(0, 1)

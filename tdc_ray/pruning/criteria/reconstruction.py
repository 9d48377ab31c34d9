"""Reconstruction: the error that the refit cannot undo (Hassibi and Stork, 1993, for groups).

It is no ``prune.method``: sensitivities rank inner units by it, whose statistics they need anyway.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tdc_ray.models.units import Unit
from tdc_ray.pruning.refit.least_squares import LeastSquares


def reconstruction_scores(
    unit: Unit, readers: Sequence[tuple[LeastSquares, Tensor]]
) -> list[float]:
    """Score a residual block's groups, or an attention's heads, by the error after a refit.

    Groups are removed one by one, always the one with the smallest squared error of the layers
    after the unit when all remaining weights are solved for anew: the optimal brain surgeon for
    whole groups. The score of a group is the error when it is removed. Errors of the layers'
    output channels count by what they do to the network's prediction.

    Args:
        unit: The unit.
        readers: For each layer that reads it the normal equations, on the base's own activations,
            and what errors in two of its output channels do together, ``(m, m)``, up to a factor
            that all share: positive semidefinite.
    """
    roots = [_root(channels.double()) for _, channels in readers]
    if not any(root.any() for root in roots):  # the prediction depends on none of them
        roots = [torch.eye(len(root), dtype=root.dtype, device=root.device) for root in roots]
    parts = []
    for (squares, _), root in zip(readers, roots, strict=True):
        gram, cross = squares.normal()
        inverse = torch.linalg.inv(gram)
        # The columns are independent of each other, so that weighing them at the start is enough.
        parts.append((inverse @ (cross @ root), inverse))  # (n, m), (n, n)
    size = len(parts[0][1]) // unit.width
    if size == len(parts) == 1:
        return _one_by_one(*parts[0])
    remaining = {step: slice(step * size, (step + 1) * size) for step in range(unit.width)}
    scores, error = [0.0] * unit.width, 0.0
    while remaining:
        increase = {
            step: sum(_increase(weights, inverse, rows) for weights, inverse in parts)
            for step, rows in remaining.items()
        }
        step = min(increase, key=increase.__getitem__)
        rows = remaining.pop(step)
        error += max(increase[step], 0.0)
        scores[step] = error
        parts = [_without(weights, inverse, rows) for weights, inverse in parts]
    return scores


def _increase(weights: Tensor, inverse: Tensor, rows: slice) -> float:
    """Return the squared error that comes on when a group's rows are removed."""
    return float((weights[rows] * torch.linalg.solve(inverse[rows, rows], weights[rows])).sum())


def _without(weights: Tensor, inverse: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Return weights and inverse solved anew without a group's rows."""
    both = torch.linalg.solve(inverse[rows, rows], torch.cat([weights[rows], inverse[rows]], 1))
    change = inverse[:, rows] @ both  # (n, m + n)
    return weights - change[:, : weights.shape[1]], inverse - change[:, weights.shape[1] :]


def _one_by_one(weights: Tensor, inverse: Tensor) -> list[float]:
    """Score groups of a single input each, of which there may be thousands: the same, at once."""
    scores, error = torch.zeros(len(inverse), dtype=torch.float64), 0.0
    left = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
    weights, inverse = weights.clone(), inverse.clone()
    for _ in range(len(inverse)):
        diagonal = inverse.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
        increase = (weights.square().sum(1) / diagonal).masked_fill(~left, torch.inf)
        index = int(increase.argmin())
        error += max(float(increase[index]), 0.0)
        scores[index], left[index] = error, False
        column = inverse[:, index] / diagonal[index]
        weights -= torch.outer(column, weights[index])
        inverse -= torch.outer(column, inverse[index].clone())
    values: list[float] = scores.tolist()
    return values


def _root(matrix: Tensor) -> Tensor:
    """Return R with ``R @ R.T`` the positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root

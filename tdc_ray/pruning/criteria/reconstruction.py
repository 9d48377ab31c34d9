"""Reconstruction: the error that the refit cannot undo (Hassibi and Stork, 1993, for groups).

It is no ``prune.method``: sensitivities rank inner units by it, whose statistics they need anyway.
"""

import torch
from torch import Tensor

from tdc_ray.models.units import Unit
from tdc_ray.pruning.refit.least_squares import LeastSquares


def reconstruction_scores(unit: Unit, squares: LeastSquares, channels: Tensor) -> list[float]:
    """Score a residual block's groups, or an attention's heads, by the error after a refit.

    Groups are removed one by one, always the one with the smallest squared error of the layer
    after the unit when all remaining weights are solved for anew: the optimal brain surgeon for
    whole groups. The score of a group is the error when it is removed. Errors of the layer's
    output channels count by what they do to the network's prediction.

    Args:
        unit: The unit.
        squares: Normal equations of the layer that reads it, on the base's own activations.
        channels: What errors in two of its output channels do together, ``(m, m)``, up to a
            factor: positive semidefinite.
    """
    gram, cross = squares.normal()
    inverse = torch.linalg.inv(gram)
    # The columns are independent of each other, so that weighing them at the start is enough.
    weights = inverse @ (cross @ _root(channels.double()))  # (n, m)
    size = len(gram) // unit.width
    remaining = {step: slice(step * size, (step + 1) * size) for step in range(unit.width)}
    scores, error = [0.0] * unit.width, 0.0
    if size == 1:
        return _one_by_one(weights, inverse)
    while remaining:
        increase = {
            step: float(
                (weights[rows] * torch.linalg.solve(inverse[rows, rows], weights[rows])).sum()
            )
            for step, rows in remaining.items()
        }
        step = min(increase, key=increase.__getitem__)
        rows = remaining.pop(step)
        error += max(increase[step], 0.0)
        scores[step] = error
        both = torch.linalg.solve(
            inverse[rows, rows], torch.cat([weights[rows], inverse[rows]], 1)
        )
        change = inverse[:, rows] @ both  # (n, m + n)
        weights = weights - change[:, : weights.shape[1]]
        inverse = inverse - change[:, weights.shape[1] :]
    return scores


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
    """Return R with ``R @ R.T`` the positive semidefinite matrix; the identity for zeros."""
    values, vectors = torch.linalg.eigh(matrix)
    if values[-1] <= 0:  # the prediction depends on none of them
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root

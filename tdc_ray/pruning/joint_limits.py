"""One budget over all groups: the limits at which their losses together increase the least.

A group carries weight by its sampling steps, and loss as it is: where the denoiser errs little, as
at the noisiest timesteps, even a deep cut adds little. TDC's own limits rise with the noise
instead (Eq. 3 and 4).
"""

import itertools
from collections.abc import Sequence

import numpy as np

from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.knapsack import knapsack, loss_curves
from tdc_ray.pruning.space import Space

NUM_LIMITS = 32
"""Limits at which a group's increase of the loss is predicted."""


def tradeoff(space: Space, increase: JointIncrease) -> FloatArray:
    """Predict how a group's loss increases as its limit falls.

    Returns:
        ``(points, 2)``: the limit as a share of the base's cost, falling from 1, and the increase
        of the loss at it. A convex curve: the lower hull of knapsacks at evenly spaced limits.
    """
    curves, base = loss_curves(space, increase.sensitivities()), space.cost_base
    points = [(1.0, 0.0)]
    for limit in np.linspace(base, space.cost(space.smallest), NUM_LIMITS, dtype=int)[1:]:
        scheme = knapsack(space, curves, int(limit))
        if np.isfinite(predicted := increase.of(scheme)):
            points.append((space.cost(scheme) / base, max(0.0, predicted)))
    return _lower_hull(points)


def share_budget(
    curves: Sequence[FloatArray], num_steps: Sequence[int], mean_share: float
) -> list[float]:
    """Share a budget: the least increase of the loss, summed over the sampling steps.

    Costs are saved where that increases the loss least, until the budget is met: on convex curves
    this is the optimum.

    Args:
        curves: Of each group, as :func:`tradeoff` has it.
        num_steps: Sampling steps in each group. A group without any costs nothing and keeps all.
        mean_share: Mean over the sampling steps of the limits.

    Returns:
        Each group's limit as a share of the base's cost. Where even the least models of all groups
        cost more, theirs.
    """
    shares, left = [1.0] * len(curves), (1.0 - mean_share) * sum(num_steps)
    pieces = []
    for index, curve in enumerate(curves):
        for (share, increase), (next_share, next_increase) in itertools.pairwise(curve):
            slope = (next_increase - increase) / (share - next_share)
            pieces.append((float(slope), index, float(share), float(next_share)))
    for _, index, share, next_share in sorted(pieces):  # those of a convex curve come in order
        if num_steps[index] and left > 0:
            shares[index] = max(next_share, share - left / num_steps[index])
            left -= (share - next_share) * num_steps[index]
    return shares


def _lower_hull(points: Sequence[tuple[float, float]]) -> FloatArray:
    """Return the corners of the lower convex hull of points, from the largest abscissa down."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-point[0], point[1])):
        if hull and x == hull[-1][0]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x0 - x) < (y - y0) * (x0 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return np.array(hull)

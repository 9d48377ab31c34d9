"""Loss curves of units from their sensitivities, and the knapsack over them."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tdc_ray.pruning.proxy import Sensitivities
from tdc_ray.pruning.space import Scheme, Space, Values, fit_to_limit

FactorArray = NDArray[np.float64]


def loss_curves(space: Space, sensitivities: Sensitivities) -> dict[str, FactorArray]:
    """Return the increase of the loss at every width of every unit, from 0 to its full width.

    It is interpolated between measured widths; against noise it never falls as a unit becomes
    narrower. Units that were not measured have no increase; NaN and infinity count as the largest
    finite increase.

    Returns:
        For every unit ``(width + 1,)``; the last is 0.
    """
    curves = {}
    increases = [loss for by_width in sensitivities.values() for loss in by_width.values()]
    finite = [increase for increase in increases if np.isfinite(increase)]
    largest = max(finite, default=1.0)
    for unit in space.units:
        measured = {unit.width: 0.0}
        for width, increase in sensitivities.get(unit.name, {}).items():
            measured[width] = increase if np.isfinite(increase) else largest
        widths = sorted(measured)
        between = np.interp(np.arange(unit.width + 1), widths, [measured[w] for w in widths])
        rising = np.maximum.accumulate(np.maximum(between[::-1], 0.0))
        curves[unit.name] = rising[::-1]
    return curves


def extend_sensitivities(
    sensitivities: Sensitivities,
    curves: Mapping[str, FactorArray],
    start: Scheme,
    further: Sensitivities,
) -> dict[str, dict[int, float]]:
    """Extend sensitivities by those that were measured on a pruned model.

    Pruned units affect each other, so that the next one costs more, or less, after others.

    Args:
        sensitivities: Those of the base.
        curves: :func:`loss_curves` of these.
        start: The scheme of the pruned model.
        further: Increase of that model's loss when one unit is pruned further.

    Returns:
        The base's increase down to a unit's width in the pruned model; below it, that at this
        width plus what was measured on the pruned model.
    """
    joined = {}
    for name, known in sensitivities.items():
        joined[name] = dict(known)
        if below := further.get(name):
            width = start[name]
            until = float(curves[name][width])
            joined[name] = {w: increase for w, increase in known.items() if w > width}
            if width < len(curves[name]) - 1:
                joined[name][width] = until
            joined[name] |= {w: until + increase for w, increase in below.items()}
    return joined


def knapsack(
    space: Space,
    curves: Mapping[str, FactorArray],
    limit: int,
    factors: FactorArray | None = None,
) -> dict[str, int]:
    """Return the scheme within a limit whose predicted increase of the loss is (nearly) least.

    Steps are removed by least increase per cost along each curve's lower convex hull: the optimum
    of the relaxed problem, short of it by at most one step once rounded.

    Raises:
        LimitError: No scheme is within the limit.
    """
    return fit_to_limit(space, space.widest, limit, step_worth(space, curves, factors))


def step_worth(
    space: Space, curves: Mapping[str, FactorArray], factors: FactorArray | None = None
) -> Values:
    """Return the value of every step: the increase of the loss without it, on the hull.

    A small charge per cost is added, so that steps whose measured increase is 0 differ by their
    factors too: else every draw would remove the same ones.
    """
    factors = np.ones(len(space.units)) if factors is None else factors
    loss_increase = sum(float(curve[0]) for curve in curves.values()) or 1.0
    charge = FREE_CHARGE * loss_increase / space.cost_base
    values = {}
    for unit, factor in zip(space.units, factors, strict=True):
        costs = np.array(space.step_costs(unit.name))
        steps = _hull_steps(curves[unit.name], costs, space.legal[unit.name]) + charge * costs
        values[unit.name] = (max(factor, LEAST_FACTOR) * steps).tolist()
    return values


def _hull_steps(curve: FactorArray, costs: FactorArray, legal: Sequence[int]) -> FactorArray:
    """Return by how much a curve's lower convex hull falls with every step: ``(width,)``.

    The hull is that of the legal widths, over the cost of their steps. Steps that are never
    removed have the value of the first that may be.
    """
    if not len(costs):  # nothing is ever kept
        return costs
    cost = np.concatenate([np.zeros(1), np.cumsum(costs / costs[0])])  # with even steps 0, 1, ...
    points: list[int] = []
    for point in legal:
        while len(points) > 1 and _is_above(curve, cost, points[-2], points[-1], point):
            points.pop()
        points.append(point)
    hull = np.interp(cost, cost[points], curve[points])
    falls: FactorArray = -np.diff(hull)
    falls[: legal[0]] = falls[legal[0]] if len(legal) > 1 else 0.0
    return falls


def _is_above(curve: FactorArray, cost: FactorArray, left: int, middle: int, right: int) -> bool:
    along, across = cost[middle] - cost[left], cost[right] - cost[left]
    line = curve[left] + (curve[right] - curve[left]) * along / across
    return bool(curve[middle] >= line)


LEAST_FACTOR = 0.3
"""Least factor of any unit."""


FREE_CHARGE = 1e-3
"""The charge of removing everything, as a share of its measured increase."""

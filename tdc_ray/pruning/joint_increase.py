"""What a quadratic model predicts of any joint cut, and the best one within a limit."""

from collections.abc import Callable

import numpy as np

from tdc_ray.pruning.knapsack import knapsack, loss_curves
from tdc_ray.pruning.quadratic_model import QuadraticModel
from tdc_ray.pruning.space import Scheme, Space

SHARED = 0.5
"""Share of what cuts of two units do to each other that counts: the refit of later layers makes
up for some of it, and it is noisier than what each does alone. On digits bases (two seeds, up to
four groups each, 0.7 F, fresh noise) schemes chosen with all of it lost more than the knapsack
without it in seven of seven cases, with half of it as much."""

LEAST_GAIN = 1e-6
"""Exchanges go on while they lower the increase by this share."""

MOST_STEPS = 3
"""Legal widths that an exchange narrows a unit by, at most: a step of one unit may cost several
times that of another."""


class JointIncrease:
    """The increase of the loss that a quadratic model predicts, for every scheme of a space.

    Between two levels what a cut does to the prediction is taken to be linear in the width, up to
    the whole unit, which does nothing. A unit that was not looked at does nothing at any width.
    """

    def __init__(self, space: Space, model: QuadraticModel) -> None:
        self._space = space
        parts, known, num_levels = [], 0, len(model.products)
        products = SHARED * np.array(model.products).reshape(num_levels, num_levels)
        for unit in space.units:
            levels = model.levels.get(unit.name, ())
            share = np.zeros((unit.width + 1 - unit.least, num_levels))
            for place in range(len(levels)):
                at_levels = np.eye(len(levels) + 1)[place]  # the last is the whole unit
                widths = [*levels, unit.width]
                every = range(unit.least, unit.width + 1)
                share[:, known + place] = np.interp(every, widths, at_levels)
            parts.append(share)
            own = slice(known, known + len(levels))
            products[own, own] /= SHARED
            known = own.stop
        between = np.concatenate(parts)  # (all units' widths, levels)
        self._products = between @ products @ between.T
        firsts = np.cumsum([0, *map(len, parts)])
        self._first = {  # the rows of width 0, whether or not there is one
            u.name: int(row) - u.least for u, row in zip(space.units, firsts, strict=False)
        }

    def of(self, scheme: Scheme) -> float:
        """Predict the increase of the loss with a scheme."""
        rows = self._rows(scheme)
        return float(self._products[np.ix_(rows, rows)].sum())

    def sensitivities(self) -> dict[str, dict[int, float]]:
        """Predict the increase of the loss with every unit cut alone, at every legal width."""
        alone = self._products.diagonal()
        return {
            name: {width: float(alone[row + width]) for width in self._space.legal[name][:-1]}
            for name, row in self._first.items()
        }

    def best_scheme(self, limit: int) -> dict[str, int]:
        """Return (nearly) the best scheme within a limit: exchanges improve two, the better stays.

        They begin with the knapsack of what units do alone, and with what is left where the step
        of the least predicted increase per cost goes until the scheme is within the limit.

        Args:
            limit: Of macs, or of nanoseconds, as the space has it.

        Raises:
            LimitError: No scheme is within the limit.
        """
        space, curves = self._space, loss_curves(self._space, self.sensitivities())
        starts = knapsack(space, curves, limit), _narrowed(space, self, limit)
        return min([exchange(space, self, start, limit) for start in starts], key=self.of)

    def falls(self, scheme: Scheme) -> Callable[[str, int], float]:
        """Return what predicts by how much the increase falls if one unit's width changes."""
        products, with_all = self._products, self._products[:, self._rows(scheme)].sum(1)

        def fall(name: str, width: int) -> float:
            before, after = self._first[name] + scheme[name], self._first[name] + width
            own = products[before, before] + products[after, after] - 2 * products[before, after]
            return float(2 * (with_all[before] - with_all[after]) - own)

        return fall

    def _rows(self, scheme: Scheme) -> list[int]:
        return [row + scheme[name] for name, row in self._first.items()]


def exchange(space: Space, increase: JointIncrease, scheme: Scheme, limit: int) -> dict[str, int]:
    """Improve a scheme by exchanges until none lowers its predicted increase.

    An exchange narrows one unit by some steps and widens others in its place, each time the one
    that gains most per cost, as long as that fits.

    Args:
        space: Without units of a stream, whose costs multiply with those of others.
        increase: Predicts the increase.
        scheme: Within the limit.
        limit: Of macs, or of nanoseconds, as the space has it.
    """
    current, value = dict(scheme), increase.of(scheme)
    while True:
        found = [current]
        for name in scheme:
            narrower = current
            for _ in range(MOST_STEPS):
                narrower = {**narrower, name: space.next_narrower(name, narrower[name])}
                found.append(_widened(space, increase, narrower, limit, without=name))
        best = min(found, key=increase.of)
        if increase.of(best) >= (1 - LEAST_GAIN) * value:
            return current
        current, value = best, increase.of(best)


def _narrowed(space: Space, increase: JointIncrease, limit: int) -> dict[str, int]:
    """Narrow units, that of the least increase per cost first, until a limit is met."""
    widths, excess = space.full, space.cost_base - limit
    while excess > 0:
        fall, options = increase.falls(widths), []
        for name, width in widths.items():
            narrower = space.next_narrower(name, width)
            cost = space.costs.marginal_cost(name, narrower, width, widths)
            if cost > 0:
                options.append((-fall(name, narrower) / cost, name, narrower, cost))
        _, name, narrower, cost = min(options)
        widths[name], excess = narrower, excess - cost
    return widths


def _widened(
    space: Space, increase: JointIncrease, scheme: Scheme, limit: int, without: str
) -> dict[str, int]:
    """Widen all units but one, that of the largest fall per cost first, as long as one fits."""
    widths, room = dict(scheme), limit - space.cost(scheme)
    while True:
        fall, options = increase.falls(widths), []
        for name, width in widths.items():
            wider = space.next_wider(name, width)
            cost = space.costs.marginal_cost(name, width, wider, widths)
            if name != without and 0 < cost <= room:
                options.append((fall(name, wider) / cost, name, wider, cost))
        if not options:
            return widths
        _, name, wider, cost = max(options)
        widths[name], room = wider, room - cost

"""Macs and parameters of every scheme as polynomials in the widths, from a table of shapes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.units import Unit

Terms = Mapping[tuple[str, ...], int]
"""Coefficients by their factors: no width, one unit's, or two units'."""


@dataclass(frozen=True, slots=True)
class Polynomial:
    """``constant + sum of a[u] w[u] + sum of b[u, v] w[u] w[v]`` over units and pairs of them.

    No unit is paired with itself, as no layer both reads and writes one unit's channels; so a
    unit's slope does not depend on its own width. What serves whole branches is added while one of
    them is there.
    """

    constant: int
    factors: Mapping[str, int]
    pairs: Mapping[tuple[str, str], int]
    partners: Mapping[str, Mapping[str, int]]
    """Coefficients of pairs by unit: ``partners[u][v]`` and ``partners[v][u]`` are ``b[u, v]``."""

    shared: Mapping[tuple[str, ...], int]
    """By units: what is there, whatever their widths, unless all of them keep nothing."""

    @classmethod
    def of(cls, terms: Terms, shared: Terms, units: Sequence[Unit]) -> Self:
        """Group the terms by unit."""
        factors = {unit.name: terms.get((unit.name,), 0) for unit in units}
        pairs: dict[tuple[str, str], int] = {}
        partners: dict[str, dict[str, int]] = {unit.name: {} for unit in units}
        for names, factor in terms.items():
            if len(names) == 2:
                one, other = names
                assert one != other
                pairs[one, other] = partners[one][other] = partners[other][one] = factor
        return cls(terms.get((), 0), factors, pairs, partners, shared)

    def total(self, widths: Mapping[str, int]) -> int:
        """Evaluate the polynomial."""
        single = sum([factor * widths[unit] for unit, factor in self.factors.items()])
        double = [factor * widths[u] * widths[v] for (u, v), factor in self.pairs.items()]
        shared = [cost for units, cost in self.shared.items() if any(widths[u] for u in units)]
        return self.constant + single + sum(double) + sum(shared)

    def marginal_cost(self, unit: str, start: int, stop: int, widths: Mapping[str, int]) -> int:
        """Return the increase from one width of a unit to a wider one, at the others' widths."""
        increase = (stop - start) * self.slope(unit, widths)
        if start == 0 < stop:
            increase += sum(
                cost
                for units, cost in self.shared.items()
                if unit in units and not any(widths[u] for u in units if u != unit)
            )
        return increase

    def slope(self, unit: str, widths: Mapping[str, int]) -> int:
        """Return the increase per step of a unit that is there, given the others' widths."""
        others = self.partners[unit].items()
        return self.factors[unit] + sum([factor * widths[other] for other, factor in others])


def macs_polynomials(
    layers: Sequence[Layer], units: Sequence[Unit]
) -> tuple[Polynomial, Polynomial]:
    """Return parameters and macs of a network as polynomials in the widths of its units.

    Returns:
        ``(num_params, macs)``.
    """
    by_name = {unit.name: unit for unit in units}

    def form(channels: tuple[Channels, ...]) -> dict[tuple[str, ...], int]:
        """Count the channels: those per step of each unit, and those that are never pruned."""
        terms: defaultdict[tuple[str, ...], int] = defaultdict(int)
        for run in channels:
            if run.unit in by_name:
                terms[run.unit,] += by_name[run.unit].channels
            else:
                terms[()] += run.count
        return terms

    removable = {unit.name for unit in units if unit.least == 0}
    num_params, macs = _Sums(), _Sums()
    for layer in layers:
        inputs = form(layer.inputs)
        for run in layer.outputs:
            ((written, rows),) = form((run,)).items()
            branches = tuple(name for name in run.branches if name in removable)
            bias = rows * (layer.has_bias and layer.has_weight)
            num_params.add(written, branches, bias)
            for read, columns in inputs.items():
                weights = rows * columns * layer.kernel_area
                both = tuple(sorted(written + read))
                num_params.add(both, branches, weights * layer.has_weight)
                macs.add(both, branches, weights * layer.pixels)
    return num_params.polynomial(units), macs.polynomial(units)


class _Sums:
    """Coefficients that are added up."""

    def __init__(self) -> None:
        self._terms: defaultdict[tuple[str, ...], int] = defaultdict(int)
        self._shared: defaultdict[tuple[str, ...], int] = defaultdict(int)

    def add(self, factors: tuple[str, ...], branches: tuple[str, ...], amount: int) -> None:
        """Add a term; without a width as its factor it is there as long as one of the branches."""
        if branches and not factors:
            self._shared[branches] += amount
        else:
            self._terms[factors] += amount

    def polynomial(self, units: Sequence[Unit]) -> Polynomial:
        """Return the polynomial in the widths of units."""
        return Polynomial.of(self._terms, self._shared, units)

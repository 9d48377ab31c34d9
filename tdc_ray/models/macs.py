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
    unit's slope does not depend on its own width.
    """

    constant: int
    factors: Mapping[str, int]
    pairs: Mapping[tuple[str, str], int]
    partners: Mapping[str, Mapping[str, int]]
    """Coefficients of pairs by unit: ``partners[u][v]`` and ``partners[v][u]`` are ``b[u, v]``."""

    @classmethod
    def of(cls, terms: Terms, units: Sequence[Unit]) -> Self:
        """Group the terms by unit."""
        factors = {unit.name: terms.get((unit.name,), 0) for unit in units}
        pairs: dict[tuple[str, str], int] = {}
        partners: dict[str, dict[str, int]] = {unit.name: {} for unit in units}
        for names, factor in terms.items():
            if len(names) == 2:
                one, other = names
                assert one != other
                pairs[one, other] = partners[one][other] = partners[other][one] = factor
        return cls(terms.get((), 0), factors, pairs, partners)

    def total(self, widths: Mapping[str, int]) -> int:
        """Evaluate the polynomial."""
        single = sum([factor * widths[unit] for unit, factor in self.factors.items()])
        double = [factor * widths[u] * widths[v] for (u, v), factor in self.pairs.items()]
        return self.constant + single + sum(double)

    def marginal_cost(self, unit: str, start: int, stop: int, widths: Mapping[str, int]) -> int:
        """Return the increase from one width of a unit to a wider one, at the others' widths."""
        return (stop - start) * self.slope(unit, widths)

    def slope(self, unit: str, widths: Mapping[str, int]) -> int:
        """Return the increase per step of a unit, given the widths of the others."""
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

    num_params: defaultdict[tuple[str, ...], int] = defaultdict(int)
    macs: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for layer in layers:
        inputs, outputs = form(layer.inputs), form(layer.outputs)
        for written, rows in outputs.items():
            num_params[written] += rows * (layer.has_bias and layer.has_weight)
            for read, columns in inputs.items():
                weights = rows * columns * layer.kernel_area
                both = tuple(sorted(written + read))
                num_params[both] += weights * layer.has_weight
                macs[both] += weights * layer.pixels
    return Polynomial.of(num_params, units), Polynomial.of(macs, units)

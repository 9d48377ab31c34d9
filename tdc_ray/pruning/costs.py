"""What a limit is put on: macs (``models.macs``), or time by a table of what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

Quantity = Literal["macs", "time"]
"""What is limited; time is in nanoseconds."""

LEAST_SAVING = 0.1
"""A narrower width saves at least this share of what as many steps of its unit save on average."""


class Costs(Protocol):
    """What schemes cost: never less for a wider unit."""

    def total(self, widths: Mapping[str, int]) -> int:
        """Return what a scheme costs."""
        ...

    def marginal_cost(self, unit: str, start: int, stop: int, widths: Mapping[str, int]) -> int:
        """Return what a unit's steps from one width to a wider one cost, given the others' widths.

        The unit's own width does not count; from 0 on it is all that the unit takes.
        """
        ...


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Nanoseconds of one forward pass of a batch: they add up over inner units."""

    rest: int
    """Of all that no unit changes."""

    times: Mapping[str, Sequence[int]]
    """Of every unit's block at the widths 0, 1, ..., never falling; at 0 there is none."""

    def total(self, widths: Mapping[str, int]) -> int:
        """Return the time of a scheme."""
        return self.rest + sum([times[widths[unit]] for unit, times in self.times.items()])

    def marginal_cost(self, unit: str, start: int, stop: int, widths: Mapping[str, int]) -> int:
        """Return the time of some steps of a unit, whatever the others' widths."""
        del widths
        return self.times[unit][stop] - self.times[unit][start]

    def time_saving_widths(self, unit: str, legal: Sequence[int]) -> tuple[int, ...]:
        """Choose those of a unit's legal widths, which rise, that save time.

        A width that takes (nearly) as long as a wider one gives channels up for nothing.
        """
        times, widest = self.times[unit], legal[-1]
        mean = (times[widest] - times[legal[0]]) / max(1, widest - legal[0])
        chosen = [widest]
        for width in reversed(legal[:-1]):
            if times[chosen[-1]] - times[width] > LEAST_SAVING * mean * (chosen[-1] - width):
                chosen.append(width)
        return tuple(reversed(chosen))


def cost_text(cost: int, quantity: Quantity) -> str:
    """Write a cost with its unit."""
    return f"{cost:,} macs" if quantity == "macs" else f"{cost / 1e6:,.4g} ms"


def step_costs(
    costs: Costs, unit: str, legal: Sequence[int], full: Mapping[str, int]
) -> list[float]:
    """Return what each of a unit's steps costs, all else uncut.

    Those between two legal widths share what these differ by; those of the least legal width,
    which always stay, count as the ones above them.
    """
    between = [
        costs.marginal_cost(unit, start, stop, full) / (stop - start)
        for start, stop in pairwise(legal)
    ]
    first = between[0] if between else costs.marginal_cost(unit, 0, legal[0], full) / legal[0]
    steps = [first] * legal[0]
    for (start, stop), cost in zip(pairwise(legal), between, strict=True):
        steps += [cost] * (stop - start)
    return steps

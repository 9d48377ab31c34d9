"""What is limited: macs (``models.macs``), or time by a table of measured times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

Quantity = Literal["macs", "time"]
"""What is limited; time is in nanoseconds."""

LEAST_SAVING = 0.1
"""A narrower width saves at least this share of what as many steps of its unit save on average."""


class Costs(Protocol):
    """The cost of schemes: never less for a wider unit."""

    def total(self, widths: Mapping[str, int]) -> int:
        """Return the cost of a scheme."""
        ...

    def marginal_cost(self, unit: str, start: int, stop: int, widths: Mapping[str, int]) -> int:
        """Return the cost of widening a unit from one width to another, given the others' widths.

        The unit's own width does not count; from width 0 it is the cost of the whole unit.
        """
        ...


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Nanoseconds of one forward pass of a batch: they add up over inner units."""

    rest: int
    """Time of everything that no unit changes."""

    times: Mapping[str, Sequence[int]]
    """Time of every unit's block at the widths 0, 1, ..., never falling; at 0 the block is
    missing."""

    def total(self, widths: Mapping[str, int]) -> int:
        """Return the time of a scheme."""
        return self.rest + sum([times[widths[unit]] for unit, times in self.times.items()])

    def marginal_cost(self, unit: str, start: int, stop: int, widths: Mapping[str, int]) -> int:
        """Return the time of some steps of a unit, whatever the others' widths."""
        del widths
        return self.times[unit][stop] - self.times[unit][start]

    def time_saving_widths(self, unit: str, legal: Sequence[int]) -> tuple[int, ...]:
        """Choose those of a unit's legal widths, which rise, that save time.

        A width that takes (nearly) as long as a wider one loses channels for nothing.
        """
        times, widest = self.times[unit], legal[-1]
        mean = (times[widest] - times[legal[0]]) / max(1, widest - legal[0])
        chosen = [widest]
        for width in reversed(legal[:-1]):
            if times[chosen[-1]] - times[width] > LEAST_SAVING * mean * (chosen[-1] - width):
                chosen.append(width)
        return tuple(reversed(chosen))


def cost_text(cost: int, quantity: Quantity) -> str:
    """Format a cost with its unit."""
    return f"{cost:,} macs" if quantity == "macs" else f"{cost / 1e6:,.4g} ms"


def step_costs(
    costs: Costs, unit: str, legal: Sequence[int], full: Mapping[str, int]
) -> list[float]:
    """Return the cost of each of a unit's steps, all else unpruned.

    Steps between two legal widths share the difference of these; those of the least legal width,
    which are always kept, count as the ones above them. A branch that may go has none of these:
    what goes with it as a whole is saved by its first step.
    """
    between = [
        costs.marginal_cost(unit, start, stop, full) / (stop - start)
        for start, stop in pairwise(legal)
    ]
    steps = legal[0] * between[:1]
    if not between and legal[0] > 0:
        steps = [costs.marginal_cost(unit, 0, legal[0], full) / legal[0]] * legal[0]
    for (start, stop), cost in zip(pairwise(legal), between, strict=True):
        steps += [cost] * (stop - start)
    return steps

"""The pruning space: the schemes of a UNet, their macs by table, and their repair to a limit."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tdc_ray.errors import LimitError
from tdc_ray.models.architectures import UNetConfig
from tdc_ray.models.layers import count
from tdc_ray.models.units import Unit, units_of

Scheme = Mapping[str, int]
"""How many groups or heads every unit keeps: at least 1, at most its width."""

Values = Mapping[str, Sequence[float]]
"""For every unit, what its 1st, 2nd, ... group or head is worth: falling, 0 or more."""


@dataclass(frozen=True, slots=True)
class Space:
    """All schemes of one UNet."""

    units: tuple[Unit, ...]
    macs_base: int
    num_params_base: int

    @property
    def full(self) -> dict[str, int]:
        """The scheme that cuts nothing."""
        return {unit.name: unit.width for unit in self.units}

    def macs(self, scheme: Scheme) -> int:
        """Macs of the UNet cut by a scheme, without building it: they add up over the units."""
        return self.macs_base - sum((u.width - scheme[u.name]) * u.macs for u in self.units)

    def num_params(self, scheme: Scheme) -> int:
        """Parameters of the UNet cut by a scheme."""
        cut = sum((u.width - scheme[u.name]) * u.num_params for u in self.units)
        return self.num_params_base - cut

    @property
    def min_macs(self) -> int:
        """Macs of the smallest scheme, which keeps one group or head of each unit."""
        return self.macs({unit.name: 1 for unit in self.units})

    def check_limit(self, max_macs: int, name: str) -> None:
        """Make sure that some scheme meets a limit.

        Raises:
            LimitError: The smallest scheme is larger.
        """
        if max_macs < self.min_macs:
            raise LimitError(
                f"{name} is limited to {max_macs:,} macs, but the smallest pruned model needs "
                f"{self.min_macs:,} ({self.min_macs / self.macs_base:.3f} of the base's "
                f"{self.macs_base:,}). Raise plan.min_macs_share or lower plan.num_groups."
            )


def space_of(config: UNetConfig) -> Space:
    """Make the pruning space of a UNet from its config."""
    num_params, macs = count(config)
    return Space(units_of(config), macs, num_params)


def repair(space: Space, scheme: Scheme, max_macs: int, values: Values) -> dict[str, int]:
    """Bring a scheme to a limit, changing it where that costs the least value.

    Steps of the least value per mac are given up until the macs are within the limit; then steps
    of the most value per mac are taken back as long as they fit. What comes out is tight: one step
    more of any unit would break the limit.

    Args:
        space: The pruning space.
        scheme: Widths wished for.
        max_macs: The limit.
        values: Worth of every step of every unit.

    Raises:
        LimitError: No scheme is within the limit.
    """
    space.check_limit(max_macs, "the model")
    units = {unit.name: unit for unit in space.units}
    widths, macs = dict(scheme), space.macs(scheme)

    def worth(name: str, width: int) -> float:
        return values[name][width - 1] / units[name].macs

    least = [(worth(name, width), name) for name, width in widths.items() if width > 1]
    heapq.heapify(least)
    while macs > max_macs:
        _, name = heapq.heappop(least)
        widths[name] -= 1
        macs -= units[name].macs
        if widths[name] > 1:
            heapq.heappush(least, (worth(name, widths[name]), name))
    best = [
        (-worth(name, width + 1), name)
        for name, width in widths.items()
        if width < units[name].width
    ]
    heapq.heapify(best)
    while best:  # a step that does not fit now never will: macs only grow from here
        _, name = heapq.heappop(best)
        if macs + units[name].macs > max_macs:
            continue
        widths[name] += 1
        macs += units[name].macs
        if widths[name] < units[name].width:
            heapq.heappush(best, (-worth(name, widths[name] + 1), name))
    assert is_tight(space, widths, max_macs)
    return widths


def is_tight(space: Space, scheme: Scheme, max_macs: int) -> bool:
    """Tell whether a scheme is within the limit and no unit could keep one step more."""
    macs = space.macs(scheme)
    return macs <= max_macs and all(
        scheme[unit.name] == unit.width or macs + unit.macs > max_macs for unit in space.units
    )

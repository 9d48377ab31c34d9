"""The pruning space: the schemes of a UNet, their macs by table, and their repair to a limit."""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tdc_ray.errors import LimitError
from tdc_ray.models.architectures import UNetConfig
from tdc_ray.models.layers import all_layers
from tdc_ray.models.units import SpaceKind, Unit, units_of
from tdc_ray.prune.table import Polynomial, tabulate

Scheme = Mapping[str, int]
"""How many steps (groups, heads, slices) every unit keeps: at least 1, at most its width."""

Values = Mapping[str, Sequence[float]]
"""For every unit, what its 1st, 2nd, ... step is worth: falling, 0 or more."""


@dataclass(frozen=True, slots=True)
class Space:
    """All schemes of one UNet.

    In the inner space macs add up over the units. With the stream's widths they multiply: what a
    step saves depends on the others' widths, though never on the unit's own.
    """

    units: tuple[Unit, ...]
    macs_base: int
    num_params_base: int
    macs_table: Polynomial
    num_params_table: Polynomial

    @property
    def full(self) -> dict[str, int]:
        """The scheme that cuts nothing."""
        return {unit.name: unit.width for unit in self.units}

    def macs(self, scheme: Scheme) -> int:
        """Macs of the UNet cut by a scheme, without building it."""
        return self.macs_table.at(scheme)

    def num_params(self, scheme: Scheme) -> int:
        """Parameters of the UNet cut by a scheme."""
        return self.num_params_table.at(scheme)

    def step_macs(self, unit: str, scheme: Scheme) -> int:
        """Macs that one step of a unit more or less makes, given the widths of the others."""
        return self.macs_table.slope(unit, scheme)

    @property
    def min_macs(self) -> int:
        """Macs of the smallest scheme, which keeps one step of each unit."""
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


def space_of(config: UNetConfig, kind: SpaceKind = "inner") -> Space:
    """Make the pruning space of a UNet from its config."""
    units = units_of(config, kind)
    num_params, macs = tabulate(all_layers(config), units)
    full = {unit.name: unit.width for unit in units}
    return Space(units, macs.at(full), num_params.at(full), macs, num_params)


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
    full, widths, macs = space.full, dict(scheme), space.macs(scheme)

    def loss(name: str) -> float:
        return values[name][widths[name] - 1] / space.step_macs(name, widths)

    def gain(name: str) -> float:
        return -values[name][widths[name]] / space.step_macs(name, widths)

    cheapest = _Queue(loss, [name for name, width in widths.items() if width > 1])
    while macs > max_macs:
        name = cheapest.pop()
        macs -= space.step_macs(name, widths)
        widths[name] -= 1
        if widths[name] > 1:
            cheapest.push(name)
    best = _Queue(gain, [name for name, width in widths.items() if width < full[name]])
    while best:  # a step that does not fit now never will: macs, and every step's, only grow
        name = best.pop()
        step = space.step_macs(name, widths)
        if macs + step > max_macs:
            continue
        macs += step
        widths[name] += 1
        if widths[name] < full[name]:
            best.push(name)
    assert is_tight(space, widths, max_macs)
    return widths


class _Queue:
    """Gives out names by rising key, where the keys of those that wait may rise meanwhile.

    They do: narrowing a unit lowers the macs of the others' steps, so that their value per mac
    rises, and widening raises the macs, so that it falls and its negative rises.
    """

    def __init__(self, key: Callable[[str], float], names: Iterable[str]) -> None:
        self._key = key
        self._heap = [(key(name), name) for name in names]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, name: str) -> None:
        """Add a name."""
        heapq.heappush(self._heap, (self._key(name), name))

    def pop(self) -> str:
        """Take the name of the least key."""
        key, name = heapq.heappop(self._heap)
        while (now := self._key(name)) > key:
            key, name = heapq.heappushpop(self._heap, (now, name))
        return name


def is_tight(space: Space, scheme: Scheme, max_macs: int) -> bool:
    """Tell whether a scheme is within the limit and no unit could keep one step more."""
    room = max_macs - space.macs(scheme)
    return room >= 0 and all(
        scheme[unit.name] == unit.width or space.step_macs(unit.name, scheme) > room
        for unit in space.units
    )

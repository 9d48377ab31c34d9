"""The pruning space: the schemes of a network, their cost, and how they are fitted to a limit."""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tdc_ray.errors import LimitError
from tdc_ray.models.macs import Polynomial, macs_polynomials
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.structure import network_structure
from tdc_ray.models.units import SpaceKind, Unit
from tdc_ray.pruning.costs import Costs, LatencyTable, Quantity, cost_text, step_costs

Scheme = Mapping[str, int]
"""How many steps (groups, heads, slices) every unit keeps, at most its width; 0: it is gone."""

Values = Mapping[str, Sequence[float]]
"""For every unit, the value of its 1st, 2nd, ... step: falling, 0 or more."""

REMEDY = "Raise plan.min_macs_share or lower plan.num_groups"


@dataclass(frozen=True, slots=True)
class Space:
    """All schemes of one network.

    In the inner space macs add up over the units. With the stream's widths they multiply: the
    saving of a step depends on the others' widths, though never on the unit's own. Where branches
    may go, the last one of a block saves what they have in common, too.
    """

    units: tuple[Unit, ...]
    macs_base: int
    num_params_base: int
    macs_table: Polynomial
    num_params_table: Polynomial

    costs: Costs
    """What is limited: the macs, or measured time."""

    quantity: Quantity
    legal: Mapping[str, tuple[int, ...]]
    """For every unit the widths that it may keep, rising; the last is its own, unless bounded."""

    @property
    def full(self) -> dict[str, int]:
        """The scheme that prunes nothing."""
        return {unit.name: unit.width for unit in self.units}

    @property
    def has_steps(self) -> bool:
        """Whether every unit lies within a step of its name, which runs by itself."""
        return all(unit.has_step for unit in self.units)

    def macs(self, scheme: Scheme) -> int:
        """Return the macs of the network pruned by a scheme, without building it."""
        return self.macs_table.total(scheme)

    def num_params(self, scheme: Scheme) -> int:
        """Return the parameters of the network pruned by a scheme."""
        return self.num_params_table.total(scheme)

    @property
    def smallest(self) -> dict[str, int]:
        """The scheme that prunes as much as possible."""
        return {name: widths[0] for name, widths in self.legal.items()}

    @property
    def widest(self) -> dict[str, int]:
        """The scheme that prunes as little as possible: the full one, unless bounded."""
        return {name: widths[-1] for name, widths in self.legal.items()}

    def cost(self, scheme: Scheme) -> int:
        """Return a scheme's cost, in the limited quantity."""
        return self.costs.total(scheme)

    @property
    def cost_base(self) -> int:
        """The cost of the unpruned network."""
        return self.costs.total(self.full)

    def nanoseconds(self, scheme: Scheme) -> int | None:
        """Return the time of a forward pass by the table; None where macs are limited."""
        return self.costs.total(scheme) if self.quantity == "time" else None

    def step_costs(self, unit: str) -> list[float]:
        """Return the cost of each of a unit's steps, all else unpruned."""
        return step_costs(self.costs, unit, self.legal[unit], self.full)

    def next_narrower(self, unit: str, width: int) -> int:
        """Return the next narrower legal width, or the least one itself."""
        legal = self.legal[unit]
        return legal[max(0, bisect_left(legal, width) - 1)]

    def next_wider(self, unit: str, width: int) -> int:
        """Return the next wider legal width, or the whole unit's itself."""
        legal = self.legal[unit]
        return legal[min(len(legal) - 1, bisect_right(legal, width))]

    def floor_width(self, unit: str, width: int) -> int:
        """Return the widest legal width within a width, or the least one where there is none."""
        legal = self.legal[unit]
        return legal[max(0, bisect_right(legal, width) - 1)]

    def ceil_widths(self, scheme: Scheme) -> dict[str, int]:
        """Round every width up to a legal one."""
        return {
            name: self.legal[name][bisect_left(self.legal[name], width)]
            for name, width in scheme.items()
        }

    def timed(self, table: LatencyTable) -> "Space":
        """Return the same space with time as what is limited; legal widths must save time, too."""
        legal = {
            name: table.time_saving_widths(name, widths) for name, widths in self.legal.items()
        }
        return replace(self, costs=table, quantity="time", legal=legal)

    def check_limit(self, limit: int, name: str, remedy: str = REMEDY) -> None:
        """Check that some scheme meets a limit.

        Args:
            limit: Of macs, or of nanoseconds.
            name: Name of the limited group or model.
            remedy: What to do if none does.

        Raises:
            LimitError: The smallest scheme is larger.
        """
        least, base = self.cost(self.smallest), self.cost_base
        if limit < least:
            multiple = max(unit.multiple for unit in self.units)
            lower = f", or lower prune.channel_multiple {multiple}" if multiple > 1 else ""
            raise LimitError(
                f"{name} is limited to {cost_text(limit, self.quantity)}, but the smallest pruned "
                f"model needs {cost_text(least, self.quantity)} ({least / base:.3f} of the base's "
                f"{cost_text(base, self.quantity)}). {remedy}{lower}."
            )


def space_of(config: NetworkConfig, kind: SpaceKind = "inner", channel_multiple: int = 1) -> Space:
    """Create the pruning space of a network from its config; macs are limited.

    Args:
        config: The network's config.
        kind: What can be pruned.
        channel_multiple: Divisor of the channels that a pruned unit keeps.
    """
    structure = network_structure(config, kind)
    units = tuple(replace(unit, multiple=channel_multiple) for unit in structure.units)
    num_params, macs = macs_polynomials(structure.layers, units)
    full = {unit.name: unit.width for unit in units}
    legal = {unit.name: unit.legal_widths for unit in units}
    return Space(
        units, macs.total(full), num_params.total(full), macs, num_params, macs, "macs", legal
    )


def fit_to_limit(space: Space, scheme: Scheme, limit: int, values: Values) -> dict[str, int]:
    """Fit a scheme to a limit, changing it where that costs the least value.

    Units change from one legal width to the next: those that lose the least value per cost are
    narrowed until the scheme is within the limit, then those that gain the most are widened as
    long as they fit. The result is tight: no unit could have its next wider legal width.

    Args:
        space: The pruning space.
        scheme: Widths asked for; those that are not legal count as the next wider legal ones.
        limit: Of macs, or of nanoseconds, as the space has it.
        values: Value of every step of every unit.

    Raises:
        LimitError: No scheme is within the limit.
    """
    space.check_limit(limit, "the model")
    widths = space.ceil_widths(scheme)
    cost = space.cost(widths)

    def value_per_cost(name: str, start: int, stop: int) -> float:
        return sum(values[name][start:stop]) / space.costs.marginal_cost(name, start, stop, widths)

    def loss(name: str) -> float:
        return value_per_cost(name, space.next_narrower(name, widths[name]), widths[name])

    def gain(name: str) -> float:
        return -value_per_cost(name, widths[name], space.next_wider(name, widths[name]))

    least, most = space.smallest, space.widest
    cheapest = _Queue(loss, [name for name, width in widths.items() if width > least[name]])
    while cost > limit:
        name = cheapest.pop()
        narrower = space.next_narrower(name, widths[name])
        cost -= space.costs.marginal_cost(name, narrower, widths[name], widths)
        widths[name] = narrower
        if narrower > least[name]:
            cheapest.push(name)
    best = _Queue(gain, [name for name, width in widths.items() if width < most[name]])
    # What does not fit now never will: costs of single steps only grow, but for what a block's
    # branches share, which another branch then paid out of the same room.
    while best:
        name = best.pop()
        wider = space.next_wider(name, widths[name])
        extra = space.costs.marginal_cost(name, widths[name], wider, widths)
        if cost + extra > limit:
            continue
        cost += extra
        widths[name] = wider
        if wider < most[name]:
            best.push(name)
    assert is_tight(space, widths, limit)
    return widths


class _Queue:
    """Pops names by rising key, where the keys of waiting names may rise meanwhile.

    Narrowing a unit never raises the cost of the others' steps, so that their value per cost does
    not fall; widening is the same for the negative. (The last branch of a block saves more when
    the others are gone: it may be popped later than it should.)
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
        """Remove and return the name of the least key."""
        key, name = heapq.heappop(self._heap)
        while (now := self._key(name)) > key:
            key, name = heapq.heappushpop(self._heap, (now, name))
        return name


def is_tight(space: Space, scheme: Scheme, limit: int) -> bool:
    """Whether a scheme is within the limit and no unit could have its next wider width."""
    room = limit - space.cost(scheme)
    return room >= 0 and all(
        width == space.legal[name][-1]
        or space.costs.marginal_cost(name, width, space.next_wider(name, width), scheme) > room
        for name, width in scheme.items()
    )

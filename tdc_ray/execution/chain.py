"""Chains of work items: which items follow from the results of which."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tdc_ray.errors import TdcError
from tdc_ray.execution.events import EventSink, Finished, Started, ignore, reporter
from tdc_ray.execution.item import AnyItem, R, WorkItem, finished, run_item

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Barrier:
    """A chain that yields it waits until all other participants that still run have yielded it."""

    name: str
    participants: frozenset[str]
    """Names of chains."""


Chain = Generator[Sequence[AnyItem] | Barrier, Sequence[Any], T]
"""Yields items that may run side by side, is sent their results in order, and returns a value. A
barrier is answered with no results."""


def result_of(item: WorkItem[Any, R]) -> Chain[R]:
    """Yield one item and return its result, for ``yield from`` in a chain."""
    (result,) = yield from results_of([item])
    return result


def results_of(items: Sequence[WorkItem[Any, R]]) -> Chain[Sequence[R]]:
    """Yield items that may run side by side and return their results in order."""
    results: Sequence[R] = yield items
    return results


@dataclass(slots=True)
class _ChainState(Generic[T]):
    """A chain, and what it waits for."""

    chain: Chain[T]
    waits_for: Sequence[AnyItem] | Barrier | None = None
    """None means that it was not started."""

    results: dict[str, Any] = field(default_factory=dict)
    """Results so far of the items that it waits for, by key."""

    stage: int = 0
    """How often it advanced."""


class Chains(Generic[T]):
    """Chains that run side by side: which of them can advance, and with what items."""

    def __init__(self, chains: Mapping[str, Chain[T]]) -> None:
        self.values: dict[str, T] = {}
        """What the chains that ended returned, by their names."""

        self.errors: dict[str, TdcError] = {}
        """What chains raised between their items, by their names."""

        self._states = {name: _ChainState(chain) for name, chain in chains.items()}
        self._changed = dict.fromkeys(chains)
        """Chains that changed since they were last examined, in order."""

        self._at_barrier: set[str] = set()

    def advance(self) -> list[tuple[str, AnyItem]]:
        """Advance every chain that can, and return the items to run with their chains' names.

        Items that an earlier attempt finished are not among them.
        """
        missing: list[tuple[str, AnyItem]] = []
        while self._changed:
            movable = dict.fromkeys(
                other for name in self._changed for other in self._movable(name)
            )
            self._changed.clear()
            for name in movable:  # all that were at one barrier, before they change again
                missing += [(name, item) for item in self._advance(name)]
        return missing

    def deliver(self, name: str, item: AnyItem, result: object) -> None:
        """Deliver the result of one of a chain's items; a cancelled chain ignores it."""
        if name in self._states:
            self._states[name].results[item.key] = result
            self._changed[name] = None

    def cancel(self, name: str) -> None:
        """Cancel a chain; the others no longer wait for it."""
        if self._states.pop(name, None) is not None:
            self._at_barrier.discard(name)
            self._changed |= dict.fromkeys(sorted(self._at_barrier))

    def active(self) -> list[str]:
        """Return the names of the chains that neither ended nor were cancelled."""
        return list(self._states)

    def stage(self, name: str) -> int:
        """Return how often a chain advanced; -1 for one that is not active."""
        return self._states[name].stage if name in self._states else -1

    def _movable(self, name: str) -> list[str]:
        """Return the chains that can advance after one changed: it, or all at its barrier."""
        if name not in self._states or not self._can_advance(name):
            return []
        waits_for = self._states[name].waits_for
        if isinstance(waits_for, Barrier):
            participants = {name, *waits_for.participants}
            return [other for other in self._states if other in participants]
        return [name]

    def _can_advance(self, name: str) -> bool:
        waits_for, results = self._states[name].waits_for, self._states[name].results
        if waits_for is None:
            return True
        if not isinstance(waits_for, Barrier):
            return all(item.key in results for item in waits_for)
        others = [self._states[other] for other in waits_for.participants & self._states.keys()]
        return all(waits_for == other.waits_for for other in others)

    def _advance(self, name: str) -> list[AnyItem]:
        state, results = self._states[name], None
        if isinstance(state.waits_for, Barrier):
            self._at_barrier.discard(name)
            results = []
        elif state.waits_for is not None:
            results = [state.results.pop(item.key) for item in state.waits_for]
        state.stage += 1
        try:
            waits_for = state.waits_for = state.chain.send(results)
            self._changed[name] = None
            if isinstance(waits_for, Barrier):
                self._at_barrier.add(name)
                return []
            earlier = {item.key: finished(item) for item in waits_for}
        except StopIteration as stop:
            self.values[name] = stop.value
        except TdcError as error:  # such as of a store that cannot be written to
            self.errors[name] = error
        else:
            state.results = {key: result.value for key, result in earlier.items() if result}
            return [item for item in waits_for if earlier[item.key] is None]
        self.cancel(name)
        return []


def run_chain(chain: Chain[T], sink: EventSink = ignore) -> T:
    """Run one chain in this process; see :func:`run_chains`."""
    return run_chains({"": chain}, sink)[""]


def run_chains(chains: Mapping[str, Chain[T]], sink: EventSink = ignore) -> dict[str, T]:
    """Run chains in this process, one item after the other; the first error ends them all.

    Args:
        chains: By their names.
        sink: Takes the events of their items.

    Returns:
        What each chain returned, by its name.
    """
    state = Chains(chains)
    while missing := state.advance():
        for name, item in missing:
            sink(Started(item.key, item.num_steps))
            try:
                state.deliver(name, item, run_item(item, reporter(sink, item.key)))
            finally:
                sink(Finished(item.key))
    for error in state.errors.values():
        raise error
    return state.values

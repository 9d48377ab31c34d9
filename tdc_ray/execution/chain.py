"""Chains of work items: what follows from the results of what."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tdc_ray.errors import TdcError
from tdc_ray.execution.events import EventSink, Finished, Started, ignore, reporter
from tdc_ray.execution.item import AnyItem, R, WorkItem, finished, run_item

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Barrier:
    """A chain that yields it goes on when all other parties, but those that ended, have come."""

    name: str
    participants: frozenset[str]
    """Names of the chains that meet."""


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
class _State(Generic[T]):
    """A chain, and what it waits for."""

    chain: Chain[T]
    waits_for: Sequence[AnyItem] | Barrier | None = None
    """None before it was started."""

    results: dict[str, Any] = field(default_factory=dict)
    """Of the items that it waits for, as far as they are there, by key."""

    stage: int = 0
    """How often it went on."""


class Chains(Generic[T]):
    """Chains that are under way side by side: which of them can go on, and with what items."""

    def __init__(self, chains: Mapping[str, Chain[T]]) -> None:
        self.values: dict[str, T] = {}
        """What the chains that ended returned, by their names."""

        self.errors: dict[str, TdcError] = {}
        """What the chains that failed between their items raised, by their names."""

        self._states = {name: _State(chain) for name, chain in chains.items()}
        self._changed = dict.fromkeys(chains)
        """Chains to which something happened since they were last looked at, in order."""

        self._meeting: set[str] = set()
        """Chains that wait in a meeting."""

    def advance(self) -> list[tuple[str, AnyItem]]:
        """Let every chain go on that can, and give the items that are to be run, by its name.

        Items whose results an earlier attempt left are not among them.
        """
        missing: list[tuple[str, AnyItem]] = []
        while self._changed:
            movable = dict.fromkeys(
                other for name in self._changed for other in self._movable(name)
            )
            self._changed.clear()
            for name in movable:  # all that meet, in one turn
                missing += [(name, item) for item in self._advance(name)]
        return missing

    def deliver(self, name: str, item: AnyItem, result: object) -> None:
        """Give a chain the result of one of its items; a chain that was dropped takes none."""
        if name in self._states:
            self._states[name].results[item.key] = result
            self._changed[name] = None

    def cancel(self, name: str) -> None:
        """End a chain that failed; the others no longer wait for it."""
        if self._states.pop(name, None) is not None:
            self._meeting.discard(name)
            self._changed |= dict.fromkeys(sorted(self._meeting))

    def active(self) -> list[str]:
        """Name the chains that neither ended nor were dropped."""
        return list(self._states)

    def stage(self, name: str) -> int:
        """Say how often a chain went on; one that ended or was dropped is at stage -1."""
        return self._states[name].stage if name in self._states else -1

    def _movable(self, name: str) -> list[str]:
        """Name the chains that can go on after news of one: it, and those that it meets."""
        if name not in self._states or not self._can_go_on(name):
            return []
        waits_for = self._states[name].waits_for
        if isinstance(waits_for, Barrier):
            participants = {name, *waits_for.participants}
            return [other for other in self._states if other in participants]
        return [name]

    def _can_go_on(self, name: str) -> bool:
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
            self._meeting.discard(name)
            results = []
        elif state.waits_for is not None:
            results = [state.results.pop(item.key) for item in state.waits_for]
        state.stage += 1
        try:
            waits_for = state.waits_for = state.chain.send(results)
            self._changed[name] = None
            if isinstance(waits_for, Barrier):
                self._meeting.add(name)
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
    """Run a chain that meets no other in this process, one item after the other.

    Args:
        chain: The chain.
        sink: Takes the events of its items.
    """
    chains = Chains({"": chain})
    while missing := chains.advance():
        for name, item in missing:
            sink(Started(item.key, item.num_steps))
            try:
                chains.deliver(name, item, run_item(item, reporter(sink, item.key)))
            finally:
                sink(Finished(item.key))
    for error in chains.errors.values():
        raise error
    return chains.values[""]

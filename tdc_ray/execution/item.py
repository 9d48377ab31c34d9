"""Work items: what a run is cut into. An item runs in any process and leaves its result in a file.

A *chain* is a generator that yields items, is sent their results, and yields the next ones: the
stages of one group, in order. Who runs the items (a pool of Ray actors, or the calling process) is
none of the chain's business.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tdc_ray.errors import TdcError
from tdc_ray.storage.files import exists, read_json, write_json

Result = dict[str, Any]
"""What an item gives back: plain JSON values. Anything larger is a file that the result names."""

Inputs = Mapping[str, Any]
"""All that a result follows from: plain JSON values. Equal inputs give equal results."""

Report = Callable[[Mapping[str, float], int], None]
"""Takes metrics and the step that they belong to."""

Reported = tuple[int, Mapping[str, float]]
"""A step and its metrics."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker takes of its node."""

    cpus: float
    """CPUs; whole ones are as many threads."""

    gpus: float = 0.0
    """GPUs; fractions share one."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A piece of work that needs nothing but its job and the run directory."""

    key: str
    """Name within the run, such as ``group-03/finetune``; also where its metrics are filed."""

    function: Callable[[Any, Report], Result]
    """What to call; a module-level function, so that it can be sent by its name."""

    job: Any
    """A frozen dataclass of paths and small values, handed to the function."""

    result_path: Path
    """Where the result is kept: an item whose result exists is never run again."""

    cost: float
    """Expected macs, in any unit that is the same for all items."""

    cost_behind: float = 0.0
    """Expected macs of what its chain does after it."""

    num_steps: int = 1
    """Steps that it reports, for the progress display."""

    resources: Resources | None = None
    """What each of its workers takes; None: what all others take."""

    num_workers: int = 1
    """Workers that run it side by side, data parallel; the first one's result counts."""

    halve: Callable[[Any], Any] | None = None
    """Makes of its job one that needs about half the memory and comes to the same; gives None
    where there is no smaller one. A module-level function."""

    inputs: Callable[[Any], Inputs | None] | None = None
    """Gives of its job what its result follows from, so that other runs may take it from a store
    (see ``tdc_ray.execution.cache``). A module-level function; None, or what gives None: none
    may."""

    files: tuple[Path, ...] = ()
    """Files and folders that it leaves beside its result."""

    on_loss: Result | None = None
    """Of a call, which waits for a language model, computes nothing and so holds no worker: what
    it gives where whoever makes the calls died too often. None: it is no call."""

    @property
    def is_call(self) -> bool:
        """Whether it waits for a language model."""
        return self.on_loss is not None

    def halved(self) -> Any | None:
        """Give its job with about half the memory, if there is one."""
        return None if self.halve is None else self.halve(self.job)


@dataclass(frozen=True, slots=True)
class Meeting:
    """A chain that yields it goes on when all other parties, but those that ended, have come."""

    name: str
    parties: frozenset[str]
    """Names of the chains that meet."""


Chain = Generator[Sequence[WorkItem] | Meeting, Sequence[Result], T]
"""Yields items that may run side by side, is sent their results in order, and returns a value. A
meeting is answered with no results."""


def finished(item: WorkItem) -> Result | None:
    """Give the result that an earlier attempt left, if there is one."""
    if not exists(item.result_path):
        return None
    result = read_json(item.result_path)
    assert isinstance(result, dict)
    return result


def stand_in(item: WorkItem) -> Result:
    """Give what a lost call gives, and keep it: what follows was made with it, in a resume too."""
    assert item.on_loss is not None
    write_json(item.result_path, item.on_loss)
    return item.on_loss


def run_item(item: WorkItem, report: Report) -> Result:
    """Run an item in this process and keep its result."""
    result = item.function(item.job, report)
    write_json(item.result_path, result)
    return result


@dataclass(slots=True)
class _State(Generic[T]):
    """A chain, and what it waits for."""

    chain: Chain[T]
    waits_for: Sequence[WorkItem] | Meeting | None = None
    """None before it was started."""

    results: dict[str, Result] = field(default_factory=dict)
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
        self._news = dict.fromkeys(chains)
        """Chains to which something happened since they were last looked at, in order."""

        self._meeting: set[str] = set()
        """Chains that wait in a meeting."""

    def go_on(self) -> list[tuple[str, WorkItem]]:
        """Let every chain go on that can, and give the items that are to be run, by its name.

        Items whose results an earlier attempt left are not among them.
        """
        missing: list[tuple[str, WorkItem]] = []
        while self._news:
            movable = dict.fromkeys(other for name in self._news for other in self._movable(name))
            self._news.clear()
            for name in movable:  # all that meet, in one turn
                missing += [(name, item) for item in self._advance(name)]
        return missing

    def put(self, name: str, item: WorkItem, result: Result) -> None:
        """Give a chain the result of one of its items; a chain that was dropped takes none."""
        if name in self._states:
            self._states[name].results[item.key] = result
            self._news[name] = None

    def drop(self, name: str) -> None:
        """End a chain that failed; the others no longer wait for it."""
        if self._states.pop(name, None) is not None:
            self._meeting.discard(name)
            self._news |= dict.fromkeys(sorted(self._meeting))

    def under_way(self) -> list[str]:
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
        if isinstance(waits_for, Meeting):
            parties = {name, *waits_for.parties}
            return [other for other in self._states if other in parties]
        return [name]

    def _can_go_on(self, name: str) -> bool:
        waits_for, results = self._states[name].waits_for, self._states[name].results
        if waits_for is None:
            return True
        if not isinstance(waits_for, Meeting):
            return all(item.key in results for item in waits_for)
        others = [self._states[other] for other in waits_for.parties & self._states.keys()]
        return all(waits_for == other.waits_for for other in others)

    def _advance(self, name: str) -> list[WorkItem]:
        state, results = self._states[name], None
        if isinstance(state.waits_for, Meeting):
            self._meeting.discard(name)
            results = []
        elif state.waits_for is not None:
            results = [state.results.pop(item.key) for item in state.waits_for]
        state.stage += 1
        try:
            waits_for = state.waits_for = state.chain.send(results)
            self._news[name] = None
            if isinstance(waits_for, Meeting):
                self._meeting.add(name)
                return []
            earlier = {item.key: finished(item) for item in waits_for}
        except StopIteration as stop:
            self.values[name] = stop.value
        except TdcError as error:  # such as of a store that cannot be written to
            self.errors[name] = error
        else:
            state.results = {key: result for key, result in earlier.items() if result is not None}
            return [item for item in waits_for if earlier[item.key] is None]
        self.drop(name)
        return []


@contextmanager
def unwatched(_: WorkItem) -> Iterator[Report]:
    """Heed nothing that an item reports."""
    yield lambda _metrics, _step: None


def run_chain(
    chain: Chain[T], watch: Callable[[WorkItem], AbstractContextManager[Report]] = unwatched
) -> T:
    """Run a chain that meets no other in this process, one item after the other.

    Args:
        chain: The chain.
        watch: Entered while an item runs; gives what takes its reports.
    """
    chains = Chains({"": chain})
    while missing := chains.go_on():
        for name, item in missing:
            with watch(item) as report:
                chains.put(name, item, run_item(item, report))
    for error in chains.errors.values():
        raise error
    return chains.values[""]

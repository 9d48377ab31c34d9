"""The scheduler: which worker runs which item next. Pure decisions: no Ray and no clock.

The pool and the simulator both drive a :class:`Scheduler`: they report what happened and carry out
its decisions.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Generic, TypeVar

from tdc_ray.execution.chain import Chain, Chains
from tdc_ray.execution.item import AnyItem, Resources, finished, use_fallback
from tdc_ray.execution.retry import Action, Failure, after_failure

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Assignment:
    """One attempt at an item."""

    number: int
    chain: str
    stage: int
    """Stage of its chain: items of one stage may run side by side."""

    item: AnyItem
    workers: tuple[str, ...]
    """Empty means that a service runs it."""

    attempt: int
    """Counted from 1."""


_Ready = tuple[float, str, int, str, AnyItem]
"""Minus the work in an item and after it, its key, a tie-break, its chain, the item."""


class Scheduler(Generic[T]):
    """Assigns the items of chains to workers that join and leave.

    Longest first: the item with the most work in it and after it in its chain, so that the group
    that will take longest never waits for a shorter one. If the first item needs several workers,
    those behind it wait, or it would never start; unless there are too few workers for it.
    """

    def __init__(
        self, chains: Mapping[str, Chain[T]], *, default: Resources, max_attempts: int
    ) -> None:
        """Start the chains.

        Args:
            chains: By their names.
            default: Resources of a worker for items that name none.
            max_attempts: How often an item may be started whose worker dies or that fails for
                reasons outside of it.
        """
        self._chains, self._default, self._max_attempts = Chains(chains), default, max_attempts
        self.values = self._chains.values
        """What the chains that ended returned, by name."""

        self._ready: dict[Resources, list[_Ready]] = defaultdict(list)
        self._given_up: dict[str, str] = {}
        self._for_services: list[tuple[str, AnyItem]] = []
        self._deferred: list[tuple[str, AnyItem]] = []
        self._idle: dict[Resources, list[str]] = defaultdict(list)
        self._wanted: Counter[Resources] = Counter()
        self._busy: Counter[Resources] = Counter()
        self._running: dict[int, Assignment] = {}
        self._failures: Counter[tuple[str, str, Failure]] = Counter()
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._numbers = count()
        self._enqueue(self._chains.advance())

    @property
    def failed(self) -> dict[str, str]:
        """Why chains failed, by name: in one of their items, or between two."""
        return self._given_up | {name: str(error) for name, error in self._chains.errors.items()}

    @property
    def is_done(self) -> bool:
        """Whether nothing remains to run."""
        waiting = self._for_services or self._deferred or any(self._ready.values())
        return not (self._running or waiting)

    def active(self) -> list[str]:
        """Return the names of the chains that neither ended nor failed."""
        return self._chains.active()

    def join(self, worker: str, resources: Resources) -> None:
        """Add an idle worker."""
        self._idle[resources].append(worker)

    def leave(self, worker: str) -> None:
        """Remove a lost worker, if it was idle."""
        for idle in self._idle.values():
            if worker in idle:
                idle.remove(worker)

    def spare(self) -> dict[str, Resources]:
        """Return the idle workers that nothing is ready for."""
        return {
            worker: resources
            for resources, idle in self._idle.items()
            if not self._ready[resources]
            for worker in idle
        }

    def next_workers(self) -> list[str]:
        """Return the names of the idle workers that the next items would run on."""
        return [
            worker
            for resources, ready in self._ready.items()
            for worker in self._idle[resources][-sum(entry[-1].num_workers for entry in ready) :]
            if ready
        ]

    def wanted(self) -> dict[Resources, int]:
        """Count the workers that all items which run or could run need."""
        return dict(+self._wanted)

    def start(self) -> list[Assignment]:
        """Return what to start now: all items for services, and the longest ones for workers.

        Of idle workers the one that was busy last comes first: its caches are warm.
        """
        started = [self._assign(chain, item, ()) for chain, item in self._for_services]
        self._for_services.clear()
        for resources in list(self._ready):
            idle = self._idle[resources]
            while (entry := self._pop_ready(resources)) is not None:
                *_, chain, item = entry
                workers = tuple(idle.pop() for _ in range(item.num_workers))
                started.append(self._assign(chain, item, workers))
        return started

    def defer(self, assignment: Assignment) -> None:
        """Postpone an item that another run computes at the moment; its workers are idle again."""
        self._attempts[assignment.chain, assignment.item.key] -= 1
        self._end(assignment)
        self._deferred.append((assignment.chain, assignment.item))

    def resume_deferred(self) -> bool:
        """Make postponed items ready again; return whether there are any."""
        deferred, self._deferred = self._deferred, []
        self._enqueue(deferred)
        return bool(deferred)

    def finish(self, assignment: Assignment, result: object) -> None:
        """Deliver an item's result; its workers are idle again."""
        self._end(assignment)
        self._chains.deliver(assignment.chain, assignment.item, result)
        self._enqueue(self._chains.advance())

    def fail(
        self, assignment: Assignment, failure: Failure, reason: str, lost: Iterable[str] = ()
    ) -> Action:
        """Decide what follows when an item did not finish.

        Args:
            assignment: The item and its workers.
            failure: What happened.
            reason: The same in words.
            lost: Those of its workers that were lost.
        """
        self._end(assignment, lost)
        chain, item = assignment.chain, assignment.item
        if chain in self._given_up:
            return Action.GIVE_UP
        times = self._failures[chain, item.key, failure] + 1
        action = after_failure(item, failure, times, self._max_attempts)
        if action is not Action.REDUCE_MEMORY:
            self._failures[chain, item.key, failure] = times
        result = finished(item) if item.service is None else None
        if result is not None:  # its worker died between its work and its answer
            self._chains.deliver(chain, item, result.value)
            action = Action.RETRY
        elif action is Action.RETRY:
            self._enqueue([(chain, item)])
        elif action is Action.REDUCE_MEMORY:
            self._enqueue([(chain, replace(item, job=item.reduced_memory()))])
        elif action is Action.USE_FALLBACK:
            self._chains.deliver(chain, item, use_fallback(item))
        else:
            self._give_up(chain, reason)
        self._enqueue(self._chains.advance())
        return action

    def _pop_ready(self, resources: Resources) -> _Ready | None:
        """Remove and return the longest item that can start; those behind a wide one wait."""
        ready, idle = self._ready[resources], len(self._idle[resources])
        if not ready or not idle:
            return None
        wanted = ready[0][-1].num_workers
        if wanted <= idle:
            return heapq.heappop(ready)
        if wanted <= idle + self._busy[resources]:
            return None
        fitting = min((entry for entry in ready if entry[-1].num_workers <= idle), default=None)
        if fitting is not None:
            ready.remove(fitting)
            heapq.heapify(ready)
        return fitting

    def _give_up(self, chain: str, reason: str) -> None:
        """End a chain; its items that run are not stopped: their results serve a later resume."""
        self._given_up[chain] = reason
        self._chains.cancel(chain)
        self._for_services = [entry for entry in self._for_services if entry[0] != chain]
        self._deferred = [entry for entry in self._deferred if entry[0] != chain]
        for resources, ready in self._ready.items():
            dropped = [entry for entry in ready if entry[-2] == chain]
            self._wanted[resources] -= sum(entry[-1].num_workers for entry in dropped)
            ready[:] = [entry for entry in ready if entry[-2] != chain]
            heapq.heapify(ready)

    def _resources(self, item: AnyItem) -> Resources:
        return item.resources or self._default

    def _assign(self, chain: str, item: AnyItem, workers: tuple[str, ...]) -> Assignment:
        self._attempts[chain, item.key] += 1
        attempt, stage = self._attempts[chain, item.key], self._chains.stage(chain)
        assignment = Assignment(next(self._numbers), chain, stage, item, workers, attempt)
        self._running[assignment.number] = assignment
        self._busy[self._resources(item)] += len(workers)
        return assignment

    def _end(self, assignment: Assignment, lost: Iterable[str] = ()) -> None:
        del self._running[assignment.number]
        resources = self._resources(assignment.item)
        self._wanted[resources] -= len(assignment.workers)
        self._busy[resources] -= len(assignment.workers)
        self._idle[resources] += sorted(set(assignment.workers) - set(lost))

    def _enqueue(self, entries: Sequence[tuple[str, AnyItem]]) -> None:
        for chain, item in entries:
            if item.service is not None:
                self._for_services.append((chain, item))
                continue
            resources = self._resources(item)
            self._wanted[resources] += item.num_workers
            entry = (-(item.cost + item.cost_behind), item.key, next(self._numbers), chain, item)
            heapq.heappush(self._ready[resources], entry)


def num_fitting(nodes: Sequence[Mapping[str, float]], needed: Mapping[str, float]) -> int:
    """Count the processes that fit on the nodes, each of them on one node.

    Args:
        nodes: Resources of every node, such as ``[{"CPU": 8.0}]``.
        needed: Resources of one process.
    """
    return sum(
        min(int(node.get(name, 0.0) / amount) for name, amount in needed.items() if amount > 0)
        for node in nodes
    )

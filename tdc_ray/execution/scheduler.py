"""Who runs what, and what a failure leads to. Pure decisions: no Ray and no clock.

The pool and the simulator both run a :class:`Scheduler`: they tell it what happened, and it says
what is to be done.
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
    """An item that workers run, or whoever makes the calls."""

    number: int
    chain: str
    stage: int
    """Of its chain: items of one stage may run side by side."""

    item: AnyItem
    workers: tuple[str, ...]
    """As many as the item wants; none for a call."""

    attempt: int
    """How often the item was started, this time included."""


_Ready = tuple[float, str, int, str, AnyItem]
"""Minus the work in an item and behind it, its key, a tie-break, its chain, the item."""


class Scheduler(Generic[T]):
    """Chains under way on workers that come and go.

    Longest first: the item with the most work in it and behind it in its chain, so that the group
    that will take longest never waits for a shorter one. An item for several workers that comes
    first is waited for, or smaller ones would keep it waiting for ever; unless fewer are there.
    """

    def __init__(
        self, chains: Mapping[str, Chain[T]], *, default: Resources, max_attempts: int
    ) -> None:
        """Take the chains.

        Args:
            chains: By their names.
            default: What one worker takes for items that do not say it.
            max_attempts: How often an item may be started whose worker dies or that fails for
                reasons outside of it.
        """
        self._chains, self._default, self._max_attempts = Chains(chains), default, max_attempts
        self._ready: dict[Resources, list[_Ready]] = defaultdict(list)
        self._given_up: dict[str, str] = {}
        self._calls: list[tuple[str, AnyItem]] = []
        self._deferred: list[tuple[str, AnyItem]] = []
        self._idle: dict[Resources, list[str]] = defaultdict(list)
        self._wanted: Counter[Resources] = Counter()
        self._busy: Counter[Resources] = Counter()
        self._running: dict[int, Assignment] = {}
        self._failures: Counter[tuple[str, str, Failure]] = Counter()
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._numbers = count()
        self._put_all(self._chains.advance())

    @property
    def values(self) -> dict[str, T]:
        """What the chains that ended returned, by name."""
        return self._chains.values

    @property
    def failed(self) -> dict[str, str]:
        """Why chains failed, by name: an item of theirs, or they themselves between two."""
        return self._given_up | {name: str(error) for name, error in self._chains.errors.items()}

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        waiting = self._calls or self._deferred or any(self._ready.values())
        return not (self._running or waiting)

    def unfinished(self) -> list[str]:
        """Name the chains that are under way."""
        return self._chains.active()

    def join(self, worker: str, resources: Resources) -> None:
        """Take in a worker that has nothing to do."""
        self._idle[resources].append(worker)

    def leave(self, worker: str) -> None:
        """Forget a worker that is gone, if it was idle."""
        for idle in self._idle.values():
            if worker in idle:
                idle.remove(worker)

    def spare(self) -> dict[str, Resources]:
        """Name idle workers that nothing is ready for."""
        return {
            worker: resources
            for resources, idle in self._idle.items()
            if not self._ready[resources]
            for worker in idle
        }

    def next_workers(self) -> list[str]:
        """Name the idle workers that the next items would go to."""
        return [
            worker
            for resources, ready in self._ready.items()
            for worker in self._idle[resources][-sum(entry[-1].num_workers for entry in ready) :]
            if ready
        ]

    def wanted(self) -> dict[Resources, int]:
        """Count the workers that all items which run or could run would take."""
        return {resources: number for resources, number in self._wanted.items() if number}

    def start(self) -> list[Assignment]:
        """Give what is to be started now: all calls, and the longest items that workers are for.

        Of idle workers the one that was busy last comes first: its caches are warm.
        """
        tasks = [self._task(chain, item, ()) for chain, item in self._calls]
        self._calls.clear()
        for resources in list(self._ready):
            idle = self._idle[resources]
            while (entry := self._next(resources)) is not None:
                *_, chain, item = entry
                workers = tuple(idle.pop() for _ in range(item.num_workers))
                tasks.append(self._task(chain, item, workers))
        return tasks

    def defer(self, task: Assignment) -> None:
        """Put off an item that was to be started, which another run is at; it keeps no worker."""
        self._attempts[task.chain, task.item.key] -= 1
        self._end(task, lost=())
        self._deferred.append((task.chain, task.item))

    def resume(self) -> bool:
        """Let items that were put off be started again; say whether there are any."""
        deferred, self._deferred = self._deferred, []
        self._put_all(deferred)
        return bool(deferred)

    def finish(self, task: Assignment, result: object) -> None:
        """Take in an item's result; its workers are idle again."""
        self._end(task, lost=())
        self._chains.deliver(task.chain, task.item, result)
        self._put_all(self._chains.advance())

    def fail(
        self, task: Assignment, failure: Failure, reason: str, lost: Iterable[str] = ()
    ) -> Action:
        """Decide what follows when an item did not finish.

        Args:
            task: The item and its workers.
            failure: What happened.
            reason: The same for people.
            lost: Those of its workers that are gone.
        """
        self._end(task, lost)
        chain, item = task.chain, task.item
        if chain in self._given_up:
            return Action.GIVE_UP
        times = self._failures[chain, item.key, failure] + 1
        action = after_failure(item, failure, times, self._max_attempts)
        if action is not Action.HALVE:
            self._failures[chain, item.key, failure] = times
        result = finished(item) if item.service is None else None
        if result is not None:  # its worker died after its work and before its answer
            self._chains.deliver(chain, item, result.value)
            action = Action.RETRY
        elif action is Action.RETRY:
            self._put(chain, item)
        elif action is Action.HALVE:
            self._put(chain, replace(item, job=item.reduced_memory()))
        elif action is Action.STAND_IN:
            self._chains.deliver(chain, item, use_fallback(item))
        else:
            self._give_up(chain, reason)
        self._put_all(self._chains.advance())
        return action

    def _next(self, resources: Resources) -> _Ready | None:
        """Take the longest item out that can start; one that more workers are due for waits."""
        ready, idle = self._ready[resources], len(self._idle[resources])
        if not ready or not idle:
            return None
        wanted = ready[0][-1].num_workers
        if wanted <= idle:
            return heapq.heappop(ready)
        if wanted <= idle + self._busy[resources]:
            return None
        fitting = [entry for entry in ready if entry[-1].num_workers <= idle]
        if not fitting:
            return None
        ready.remove(min(fitting))
        heapq.heapify(ready)
        return min(fitting)

    def _give_up(self, chain: str, reason: str) -> None:
        """End a chain; what it has under way runs on, and its results are kept for a next time."""
        self._given_up[chain] = reason
        self._chains.cancel(chain)
        self._calls = [call for call in self._calls if call[0] != chain]
        self._deferred = [entry for entry in self._deferred if entry[0] != chain]
        for resources, ready in self._ready.items():
            dropped = [item for *_, name, item in ready if name == chain]
            self._wanted[resources] -= sum(item.num_workers for item in dropped)
            ready[:] = [entry for entry in ready if entry[-2] != chain]
            heapq.heapify(ready)

    def _resources(self, item: AnyItem) -> Resources:
        return item.resources or self._default

    def _task(self, chain: str, item: AnyItem, workers: tuple[str, ...]) -> Assignment:
        self._attempts[chain, item.key] += 1
        attempt, stage = self._attempts[chain, item.key], self._chains.stage(chain)
        task = Assignment(next(self._numbers), chain, stage, item, workers, attempt)
        self._running[task.number] = task
        self._busy[self._resources(item)] += len(workers)
        return task

    def _end(self, task: Assignment, lost: Iterable[str]) -> None:
        del self._running[task.number]
        resources = self._resources(task.item)
        self._wanted[resources] -= len(task.workers)
        self._busy[resources] -= len(task.workers)
        self._idle[resources] += sorted(set(task.workers) - set(lost))

    def _put(self, chain: str, item: AnyItem) -> None:
        if item.service is not None:
            self._calls.append((chain, item))
            return
        self._wanted[self._resources(item)] += item.num_workers
        entry = (-(item.cost + item.cost_behind), item.key, next(self._numbers), chain, item)
        heapq.heappush(self._ready[self._resources(item)], entry)

    def _put_all(self, entries: Sequence[tuple[str, AnyItem]]) -> None:
        for chain, item in entries:
            self._put(chain, item)


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

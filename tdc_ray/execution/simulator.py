"""The pool's scheduling policy in simulated time: what a cluster of any size would do."""

import heapq
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from tdc_ray.execution.chain import Chain
from tdc_ray.execution.item import AnyItem, Resources
from tdc_ray.execution.retry import Failure
from tdc_ray.execution.scheduler import Assignment, Scheduler
from tdc_ray.execution.timeline import lower_bound

WORKER = Resources(cpus=1.0)
"""Of every simulated worker: they are all alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureModel:
    """What happens to the workers; all rates are of exponential distributions."""

    failures_per_hour: float = 0.0
    """Of each worker."""

    joins_per_hour: float = 0.0
    """Of the cluster, while workers are missing."""

    seconds_to_join: float = 0.0
    """From a worker's start until it can work."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationResult:
    """What came out."""

    num_workers: int
    """At the start, and the most."""

    makespan_seconds: float
    lower_bound_seconds: float
    """No order could be faster, without any failure: see ``timeline.lower_bound``."""

    utilisation: float
    """Share of the workers' time that they spent on items."""

    lost_seconds: float
    """Work done twice: of items whose workers died, since their last checkpoints."""

    num_items: int
    num_failures: int
    unfinished: Mapping[str, str]
    """Chains that were given up, with the reasons."""


def simulate(
    chains: Mapping[str, Chain[Any]],
    seconds_of: Callable[[AnyItem], float],
    *,
    num_workers: int,
    weather: FailureModel = FailureModel(),  # frozen
    checkpoint_every_s: Callable[[AnyItem], float | None] = lambda _item: None,
    max_attempts: int = 3,
) -> SimulationResult:
    """Run chains on workers that take as long as they are said to.

    Args:
        chains: By their names; their items are not run, and their results are empty.
        seconds_of: What an item takes one worker.
        num_workers: At the start, and the most.
        weather: Failures and joins.
        checkpoint_every_s: How often an item keeps what it did; None: only at its end.
        max_attempts: As in ``compute.max_attempts``.
    """
    return _Simulation(
        chains, seconds_of, num_workers, weather, checkpoint_every_s, max_attempts
    ).run()


class _Simulation:
    def __init__(
        self,
        chains: Mapping[str, Chain[Any]],
        seconds_of: Callable[[AnyItem], float],
        num_workers: int,
        weather: FailureModel,
        checkpoint_every_s: Callable[[AnyItem], float | None],
        max_attempts: int,
    ) -> None:
        self._seconds_of, self._checkpoint_every_s = seconds_of, checkpoint_every_s
        self._num_workers, self._weather = num_workers, weather
        self._random = random.Random(weather.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers, self._names = count(), count()
        self._now = 0.0
        self._alive: dict[str, float] = {}
        self._running: dict[int, tuple[Assignment, float]] = {}
        self._kept: dict[tuple[str, str], float] = {}
        self._stages: dict[tuple[str, int], float] = {}
        self._work = self._lost = self._there = self._busy = 0.0
        self._num_items = self._num_failures = 0
        self._schedule: Scheduler[Any] = Scheduler(
            chains, default=WORKER, max_attempts=max_attempts
        )

    def run(self) -> SimulationResult:
        for _ in range(self._num_workers):
            self._join()
        self._expect_join()
        self._start()
        while not self._schedule.is_done and self._events and not self._is_stuck():
            self._now, _, happens = heapq.heappop(self._events)
            happens()
            self._start()
        for since in self._alive.values():
            self._there += self._now - since
        return SimulationResult(
            num_workers=self._num_workers,
            makespan_seconds=self._now,
            lower_bound_seconds=lower_bound(self._stages, self._work, self._num_workers),
            utilisation=self._busy / self._there if self._there else 0.0,
            lost_seconds=self._lost,
            num_items=self._num_items,
            num_failures=self._num_failures,
            unfinished=self._schedule.failed | self._left_over(),
        )

    def _is_stuck(self) -> bool:
        """Whether nothing runs although all workers are there: an item wants more of them."""
        return not self._running and len(self._alive) == self._num_workers

    def _left_over(self) -> dict[str, str]:
        """Say that no worker is left, where that is so."""
        if self._schedule.is_done:
            return {}
        return dict.fromkeys(self._schedule.unfinished(), "there are too few workers")

    def _at(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._numbers), happens))

    def _after(self, per_hour: float, happens: Callable[[], None]) -> None:
        if per_hour > 0:
            self._at(self._random.expovariate(per_hour / 3600), happens)

    def _start(self) -> None:
        for task in self._schedule.start():
            self._running[task.number] = (task, self._now)
            left = self._seconds_of(task.item) - self._kept.get((task.chain, task.item.key), 0.0)
            self._at(left, lambda task=task: self._finish(task))  # type: ignore[misc]

    def _finish(self, task: Assignment) -> None:
        if task.number not in self._running:
            return  # its worker died before
        _, started = self._running.pop(task.number)
        seconds, place = self._seconds_of(task.item), (task.chain, task.stage)
        self._stages[place] = max(self._stages.get(place, 0.0), seconds)
        self._work += seconds * len(task.workers)
        self._busy += (self._now - started) * len(task.workers)
        self._num_items += 1
        self._schedule.finish(task, None)

    def _join(self) -> None:
        name = f"worker-{next(self._names)}"
        self._alive[name] = self._now
        self._schedule.join(name, WORKER)
        self._after(self._weather.failures_per_hour, lambda: self._die(name))

    def _expect_join(self) -> None:
        def arrive() -> None:
            if len(self._alive) < self._num_workers:
                self._at(self._weather.seconds_to_join, self._join)
            self._expect_join()

        self._after(self._weather.joins_per_hour, arrive)

    def _die(self, name: str) -> None:
        self._num_failures += 1
        self._there += self._now - self._alive.pop(name)
        self._schedule.leave(name)
        hit = [task for task, _ in self._running.values() if name in task.workers]
        for task in hit:
            _, started = self._running.pop(task.number)
            done, place = self._now - started, (task.chain, task.item.key)
            self._busy += done * len(task.workers)
            every, before = self._checkpoint_every_s(task.item), self._kept.get(place, 0.0)
            kept = before if every is None else (before + done) // every * every
            self._kept[place] = max(before, kept)
            self._lost += (before + done - self._kept[place]) * len(task.workers)
            self._schedule.fail(task, Failure.NODE_LOST, "its node went away", [name])

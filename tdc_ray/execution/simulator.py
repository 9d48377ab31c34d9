"""The pool's scheduler in simulated time: what a cluster of any size would take."""

import heapq
import random
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import count
from typing import Any

from tdc_ray.execution.chain import Chain
from tdc_ray.execution.item import AnyItem, Resources
from tdc_ray.execution.retry import Failure
from tdc_ray.execution.scheduler import Assignment, Scheduler
from tdc_ray.execution.timeline import lower_bound

WORKER = Resources(cpus=1.0)
"""Resources of every simulated worker: they are all alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureModel:
    """What happens to the workers; all rates are of exponential distributions."""

    failures_per_hour: float = 0.0
    """Failures per hour of each worker."""

    joins_per_hour: float = 0.0
    """Joins per hour of the cluster, while workers are missing."""

    seconds_to_join: float = 0.0
    """From a worker's start until it is ready."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationResult:
    """What was simulated, and how long it took."""

    num_workers: int
    """Workers at the start; never more."""

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
    """Chains that failed, with the reasons."""


@dataclass
class Simulation:
    """A cluster in simulated time, whose workers take as long as they are said to."""

    chains: Mapping[str, Chain[Any]]
    """Chains by name; their items are not run, and their results are None."""

    seconds_of: Callable[[AnyItem], float]
    """Seconds that an item takes on its workers."""

    _: KW_ONLY
    num_workers: int
    """Workers at the start; never more."""

    failures: FailureModel = FailureModel()  # frozen
    checkpoint_every_s: Callable[[AnyItem], float | None] = lambda _item: None
    """Seconds between an item's checkpoints; None means that it saves only at its end."""

    max_attempts: int = 3
    """As in ``compute.max_attempts``."""

    def __post_init__(self) -> None:
        self._scheduler: Scheduler[Any] = Scheduler(
            self.chains, default=WORKER, max_attempts=self.max_attempts
        )
        self._random = random.Random(self.failures.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers, self._names = count(), count()
        self._joined: dict[str, float] = {}
        self._running: dict[int, tuple[Assignment, float]] = {}
        self._saved: dict[tuple[str, str], float] = {}
        self._stages: dict[tuple[str, int], float] = {}
        self._now = self._work = self._lost = self._present = self._busy = 0.0
        self._num_items = self._num_failures = 0

    def run(self) -> SimulationResult:
        """Run the chains to their end, or until no worker is left for them."""
        for _ in range(self.num_workers):
            self._join()
        self._expect_join()
        self._start()
        while not self._scheduler.is_done and self._events and not self._is_stuck():
            self._now, _, happens = heapq.heappop(self._events)
            happens()
            self._start()
        for since in self._joined.values():
            self._present += self._now - since
        unfinished = () if self._scheduler.is_done else self._scheduler.active()
        return SimulationResult(
            num_workers=self.num_workers,
            makespan_seconds=self._now,
            lower_bound_seconds=lower_bound(self._stages, self._work, self.num_workers),
            utilisation=self._busy / self._present if self._present else 0.0,
            lost_seconds=self._lost,
            num_items=self._num_items,
            num_failures=self._num_failures,
            unfinished=self._scheduler.failed
            | dict.fromkeys(unfinished, "there are too few workers"),
        )

    def _is_stuck(self) -> bool:
        """Whether nothing runs although all workers are there: an item needs more of them."""
        return not self._running and len(self._joined) == self.num_workers

    def _at(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._numbers), happens))

    def _after(self, per_hour: float, happens: Callable[[], None]) -> None:
        if per_hour > 0:
            self._at(self._random.expovariate(per_hour / 3600), happens)

    def _start(self) -> None:
        for assignment in self._scheduler.start():
            self._running[assignment.number] = (assignment, self._now)
            item = assignment.item
            saved = self._saved.get((assignment.chain, item.key), 0.0)
            self._at(self.seconds_of(item) - saved, partial(self._finish, assignment))

    def _finish(self, assignment: Assignment) -> None:
        if assignment.number not in self._running:
            return  # its worker died before
        _, started = self._running.pop(assignment.number)
        seconds, stage = self.seconds_of(assignment.item), (assignment.chain, assignment.stage)
        self._stages[stage] = max(self._stages.get(stage, 0.0), seconds)
        self._work += seconds * len(assignment.workers)
        self._busy += (self._now - started) * len(assignment.workers)
        self._num_items += 1
        self._scheduler.finish(assignment, None)

    def _join(self) -> None:
        name = f"worker-{next(self._names)}"
        self._joined[name] = self._now
        self._scheduler.join(name, WORKER)
        self._after(self.failures.failures_per_hour, partial(self._die, name))

    def _expect_join(self) -> None:
        def arrive() -> None:
            if len(self._joined) < self.num_workers:
                self._at(self.failures.seconds_to_join, self._join)
            self._expect_join()

        self._after(self.failures.joins_per_hour, arrive)

    def _die(self, name: str) -> None:
        self._num_failures += 1
        self._present += self._now - self._joined.pop(name)
        self._scheduler.leave(name)
        hit = [pair for pair in self._running.values() if name in pair[0].workers]
        for assignment, started in hit:
            del self._running[assignment.number]
            key, num_workers = (assignment.chain, assignment.item.key), len(assignment.workers)
            spent, before = self._now - started, self._saved.get(key, 0.0)
            self._busy += spent * num_workers
            every = self.checkpoint_every_s(assignment.item)
            if every is not None:
                self._saved[key] = max(before, (before + spent) // every * every)
            self._lost += (before + spent - self._saved.get(key, 0.0)) * num_workers
            self._scheduler.fail(assignment, Failure.NODE_LOST, "its node went away", [name])

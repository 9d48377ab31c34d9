"""Runs chains of work items over a crew of Ray actors; what to do is decided by ``policy``."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.errors import StorageFailedError, TdcError, WorkFailedError, is_out_of_memory
from tdc_ray.execution.chain import Chain
from tdc_ray.execution.events import Finished, Started
from tdc_ray.execution.ray.cache_session import CacheSession
from tdc_ray.execution.ray.cluster import is_alive, node_resources
from tdc_ray.execution.ray.data_parallel import Rank
from tdc_ray.execution.ray.event_collector import EventCollector
from tdc_ray.execution.ray.service import Service, start_service
from tdc_ray.execution.ray.workers import WorkerGroup, check_capacity, needs
from tdc_ray.execution.retry import Action, Failure
from tdc_ray.execution.scheduler import Assignment, Scheduler
from tdc_ray.execution.timeline import Timeline

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0
"""How often the pool looks for new nodes while nothing happens."""

SECONDS_BETWEEN_FLUSHES = 5.0
"""How often the timeline is written; in an object store each time is an object."""

SECONDS_BETWEEN_SIGNS = 60.0
"""How often the timeline says that the driver is alive: with a killed one, what ran is lost."""

SECONDS_UNTIL_SAID = 10.0
"""How long nothing can start for want of a worker before the log says so."""

SECONDS_UNTIL_GONE = 0.3
"""How long a node may outlive its workers where all of it is killed."""

SECONDS_TO_FAIL = 5.0
"""How long the other workers of an item may take to fail after one of them did."""

T = TypeVar("T")


@dataclass(slots=True)
class _Running:
    """A task, what gives its result, and those of its workers that are not done."""

    task: Assignment
    result: ray.ObjectRef
    owed: dict[ray.ObjectRef, str]
    """Their names; "" for a service."""


class Pool:
    """Runs items on actors that come and go; a context manager that ends them.

    Entering starts its services and checks them.
    """

    def __init__(
        self,
        compute: ComputeConfig,
        events: EventCollector,
        timeline: Timeline | None = None,
        sharing: CacheSession | None = None,
        services: Mapping[str, Service] | None = None,
    ) -> None:
        self._compute = compute
        self._events, self._timeline = events, timeline or Timeline(None)
        self._sharing = sharing or CacheSession(None)
        self._services = services or {}
        self._service_actors: dict[str, ActorHandle] = {}
        self._crew = WorkerGroup(compute, events.remote, self._timeline)
        self._running: dict[int, _Running] = {}

    def __enter__(self) -> "Pool":
        self._service_actors = {
            name: start_service(name, service) for name, service in self._services.items()
        }
        check_capacity(self._compute)
        return self

    def __exit__(self, *_: object) -> None:
        for running in list(self._running.values()):
            self._end(running.task, "interrupted")
        self._crew.dismiss_all()
        self._timeline.flush()

    def run(self, chains: Mapping[str, Chain[T]], phase: str = "work") -> dict[str, T]:
        """Run all chains side by side, and within each its items in order.

        A chain whose item fails for good ends there; the others are finished first.

        Args:
            chains: By their names.
            phase: What to call this in the timeline.

        Returns:
            What each chain returned, by its name.

        Raises:
            WorkFailedError: Chains failed; names each and its reason.
            ClusterError: Actors die as they start.
        """
        self._end_what_an_error_left()
        self._timeline.add("phase", name=phase)
        schedule: Scheduler[T] = Scheduler(
            chains, default=self._crew.default, max_attempts=self._compute.max_attempts
        )
        for name, resources in self._crew.ready().items():
            schedule.join(name, resources)
        idle_since = alive_since = time.monotonic()
        said, told = False, set[str]()
        while not schedule.is_done:
            waits = schedule.resume()
            self._staff(schedule)
            while tasks := schedule.start():
                for task in tasks:
                    self._start(task, schedule)
            if self._running or waits:
                idle_since = time.monotonic()
            elif not said and time.monotonic() - idle_since > SECONDS_UNTIL_SAID:
                said = True
                _say_what_waits(schedule)
            self._take_in(schedule)
            told |= self._tell_failed(schedule, told)
            if time.monotonic() - alive_since > SECONDS_BETWEEN_SIGNS:
                alive_since = time.monotonic()
                self._timeline.add("alive")
            self._timeline.flush(max_age_s=SECONDS_BETWEEN_FLUSHES)
        self._tell_failed(schedule, told)
        if schedule.failed:
            raise WorkFailedError(schedule.failed)
        return schedule.values

    def _tell_failed(self, schedule: Scheduler[T], told: set[str]) -> set[str]:
        """Note the chains that failed since, and name them."""
        new = schedule.failed.keys() - told
        for name in sorted(new):
            self._timeline.add("failed", chain=name, reason=schedule.failed[name])
        return new

    def _end_what_an_error_left(self) -> None:
        """End workers that still run items of a call that an error ended."""
        for running in self._running.values():
            for name in running.task.workers:
                self._crew.stop(name)
        self._running.clear()

    def _staff(self, schedule: Scheduler[T]) -> None:
        """Forget idle workers that died, and hire for what could run at once."""
        for name in self._crew.dead(schedule.next_workers()):
            schedule.leave(name)
            self._crew.stop(name)
        wanted = schedule.wanted()
        for name in self._crew.removable(schedule.spare(), wanted):
            schedule.leave(name)
            self._crew.stop(name)
        self._crew.start_workers(wanted)

    def _start(self, task: Assignment, schedule: Scheduler[T]) -> None:
        """Start an item, unless another run is at the very same."""
        item, run = task.item, self._sharing.begin(task.item)
        if run is None:
            schedule.defer(task)
            return
        self._events(Started(item.key, item.num_steps, task.number))
        self._timeline.add(
            "start",
            task=task.number,
            chain=task.chain,
            stage=task.stage,
            item=item.key,
            workers=task.workers,
            attempt=task.attempt,
        )
        if item.service is not None:
            actor = self._service_actors[item.service]
            ref: ray.ObjectRef = actor.run.remote(item, self._events.remote, task.number)
            self._running[task.number] = _Running(task, ref, {ref: ""})
            return
        actors = self._crew.actors(task.workers)
        refs = [
            actor.run.remote(item, run, task.number, rank)
            for actor, rank in zip(actors, _ranks(actors), strict=True)
        ]
        owed = dict(zip(refs, task.workers, strict=True))
        self._running[task.number] = _Running(task, refs[0], owed)

    def _take_in(self, schedule: Scheduler[T]) -> None:
        """Wait until something happened, and tell the schedule."""
        owed = {ref: running for running in self._running.values() for ref in running.owed}
        starting = set(self._crew.starting())
        refs = [*owed, *starting]
        if not refs:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            return
        ray.wait(refs, num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
            if ref in starting:
                name = self._crew.take_in(ref)
                if name is not None:
                    schedule.join(name, self._crew.ready()[name])
            elif owed[ref].task.number in self._running:  # no other of its workers failed
                self._take_in_result(ref, owed[ref], schedule)

    def _take_in_result(
        self, ref: ray.ObjectRef, running: _Running, schedule: Scheduler[T]
    ) -> None:
        error = _error_of(ref)
        if error is not None:
            self._take_in_failure(running, schedule)
            return
        del running.owed[ref]
        if running.owed:
            return
        result = ray.get(running.result)
        self._end(running.task, "done")
        self._crew.mark_idle(running.task.workers)
        schedule.finish(running.task, result)

    def _take_in_failure(self, running: _Running, schedule: Scheduler[T]) -> None:
        """Find out what an item died of, end what is left of it, and ask what follows."""
        task = running.task
        refs = list(running.owed)
        done, silent = ray.wait(refs, num_returns=len(refs), timeout=SECONDS_TO_FAIL)
        errors = {ref: error for ref in done if (error := _error_of(ref)) is not None}
        cause = min(errors.values(), key=_rank_as_cause)
        lost = [running.owed[ref] for ref in [*errors, *silent] if _lost(errors.get(ref))]
        lost = [name for name in lost if name]
        failure = _failure_of(cause, node_lost=self._lost_a_node(lost))
        if isinstance(cause, RayTaskError):
            reason = f"{type(cause.cause).__name__}: {cause.cause}"
        else:
            reason = f"{type(cause).__name__}: {cause}"
        what = f"failed ({reason})"
        if not isinstance(cause, RayTaskError) and (lost or task.item.service):
            reason = f"its worker died {task.attempt} times: {cause}"
            what = "lost its worker"
        for name in lost:
            self._crew.stop(name)
        self._crew.mark_idle(name for name in task.workers if name not in lost)
        self._end(task, failure.value)
        action = schedule.fail(task, failure, reason, lost)
        again = {
            Action.RETRY: "it starts again",
            Action.HALVE: "it starts again with half the images at once",
            Action.STAND_IN: "its chain goes on without it",
            Action.GIVE_UP: "it is given up",
        }
        logger.warning("%s %s (attempt %d); %s", task.item.key, what, task.attempt, again[action])

    def _lost_a_node(self, lost: list[str]) -> bool:
        """Whether workers went with their node; it may end a moment after them."""
        if lost:
            time.sleep(SECONDS_UNTIL_GONE)
        return not all(is_alive(node) for node in self._crew.nodes(lost))

    def _end(self, task: Assignment, outcome: str) -> None:
        del self._running[task.number]
        self._sharing.end(task.item)
        self._events(Finished(task.item.key, task.number))
        self._timeline.add("end", task=task.number, outcome=outcome)


def _ranks(actors: list[Any]) -> list[Rank | None]:
    """Give workers of one item their places; one alone needs none."""
    if len(actors) == 1:
        return [None]
    try:
        address: str = ray.get(actors[0].address.remote())
    except RayActorError:
        address = ""  # it died: so the items fail, too, and are taken in as others
    return [Rank(index, len(actors), address) for index in range(len(actors))]


def _error_of(ref: ray.ObjectRef) -> RayError | None:
    """Give what a finished call raised, or what became of its result."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _lost(error: RayError | None) -> bool:
    """Whether a worker is gone, or hangs, and not just its item."""
    return error is None or isinstance(error, RayActorError | OutOfMemoryError)


def _rank_as_cause(error: RayError) -> int:
    """Order errors of several workers: the others fail only because one of them did."""
    if _lost(error):
        return 0
    failure = _failure_of(error, node_lost=False)
    return [Failure.OUT_OF_MEMORY, Failure.OWN_ERROR, Failure.OTHER_ERROR].index(failure) + 1


def _failure_of(error: RayError, *, node_lost: bool) -> Failure:
    if isinstance(error, OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    if isinstance(error, RayActorError):
        return Failure.NODE_LOST if node_lost else Failure.WORKER_LOST
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, TdcError) and not isinstance(cause, StorageFailedError):
        return Failure.OWN_ERROR
    if is_out_of_memory(cause):
        return Failure.OUT_OF_MEMORY
    return Failure.OTHER_ERROR


def _say_what_waits(schedule: Scheduler[Any]) -> None:
    wishes = [f"{number} of {needs(kind)}" for kind, number in schedule.wanted().items()]
    logger.warning(
        "work waits for actors: %s could be used, and not enough are free on the nodes %s; it "
        "goes on when there is room",
        " and ".join(wishes),
        node_resources(),
    )

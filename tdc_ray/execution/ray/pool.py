"""Runs chains of work items on Ray actors and services; the scheduler decides which and when."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.errors import StorageFailedError, TdcError, WorkFailedError, is_out_of_memory
from tdc_ray.execution.chain import Chain
from tdc_ray.execution.events import Finished, Started
from tdc_ray.execution.item import Resources
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
"""Time between two writes of the timeline; in an object store each makes an object."""

SECONDS_BETWEEN_SIGNS = 60.0
"""Time between two signs of life in the timeline: what ran under a killed driver is lost."""

SECONDS_UNTIL_WARNING = 10.0
"""Time without a worker for any item after which a warning is logged."""

SECONDS_UNTIL_GONE = 0.3
"""Longest time by which a node that is killed outlives its workers."""

SECONDS_TO_FAIL = 5.0
"""Longest time that the other workers of an item take to fail after one of them did."""

SECONDS_TO_MEET = 30.0
"""Longest time that the first of an item's workers takes to say where the others find it."""

CONSEQUENCES = {
    Action.RETRY: "it starts again",
    Action.REDUCE_MEMORY: "it starts again with half the images at once",
    Action.USE_FALLBACK: "its chain goes on without it",
    Action.GIVE_UP: "it is given up",
}

T = TypeVar("T")


@dataclass(slots=True)
class _Running:
    """An assignment, the reference to its result, and those of its workers that are not done."""

    assignment: Assignment
    result: ray.ObjectRef
    pending: dict[ray.ObjectRef, str]
    """Names of its workers; "" for a service."""


class Pool:
    """Runs items on actors that start and stop with the nodes; a context manager that ends them.

    Entering starts its services and checks them.
    """

    def __init__(
        self,
        compute: ComputeConfig,
        events: EventCollector,
        timeline: Timeline | None = None,
        session: CacheSession | None = None,
        services: Mapping[str, Service] | None = None,
    ) -> None:
        self._compute = compute
        self._events, self._timeline = events, timeline or Timeline(None)
        self._session = session or CacheSession(None)
        self._services = services or {}
        self._service_actors: dict[str, Any] = {}
        self._workers = WorkerGroup(compute, events.remote, self._timeline)
        self._running: dict[int, _Running] = {}

    def __enter__(self) -> "Pool":
        self._service_actors = {
            name: start_service(name, service) for name, service in self._services.items()
        }
        check_capacity(self._compute)
        return self

    def __exit__(self, *_: object) -> None:
        for running in list(self._running.values()):
            self._end(running.assignment, "interrupted")
        self._workers.stop_all()
        self._timeline.flush()

    def run(self, chains: Mapping[str, Chain[T]], phase: str = "work") -> dict[str, T]:
        """Run all chains side by side, and within each its items in order.

        A chain whose item fails for good ends there; the others are finished first.

        Args:
            chains: By their names.
            phase: Its name in the timeline.

        Returns:
            What each chain returned, by its name.

        Raises:
            WorkFailedError: Chains failed; names each and its reason.
            ClusterError: Actors die as they start.
        """
        self._stop_busy()
        self._timeline.add("phase", name=phase)
        scheduler: Scheduler[T] = Scheduler(
            chains, default=self._workers.default, max_attempts=self._compute.max_attempts
        )
        for name, resources in self._workers.ready().items():
            scheduler.join(name, resources)
        idle_since = alive_since = time.monotonic()
        warned, failed = False, set[str]()
        while not scheduler.is_done:
            has_deferred = scheduler.resume_deferred()
            self._adjust_workers(scheduler)
            while assignments := scheduler.start():
                for assignment in assignments:
                    self._start(assignment, scheduler)
            if self._running or has_deferred:
                idle_since = time.monotonic()
            elif not warned and time.monotonic() - idle_since > SECONDS_UNTIL_WARNING:
                warned = True
                _warn_of_waiting(scheduler)
            self._wait(scheduler)
            self._note_failed(scheduler, failed)
            if time.monotonic() - alive_since > SECONDS_BETWEEN_SIGNS:
                alive_since = time.monotonic()
                self._timeline.add("alive")
            self._timeline.flush(max_age_s=SECONDS_BETWEEN_FLUSHES)
        self._note_failed(scheduler, failed)
        if scheduler.failed:
            raise WorkFailedError(scheduler.failed)
        return scheduler.values

    def num_workers(self, resources: Resources) -> int:
        """Return how many workers of a kind there can be at once on the nodes that there are."""
        return max(1, self._workers.most(resources))

    def _note_failed(self, scheduler: Scheduler[T], noted: set[str]) -> None:
        """Add the chains that failed to the timeline, unless they are in it."""
        for name in sorted(scheduler.failed.keys() - noted):
            self._timeline.add("failed", chain=name, reason=scheduler.failed[name])
            noted.add(name)

    def _stop_busy(self) -> None:
        """End workers that still run items of a call that an error ended."""
        for running in self._running.values():
            for name in running.assignment.workers:
                self._workers.stop(name)
        self._running.clear()

    def _adjust_workers(self, scheduler: Scheduler[T]) -> None:
        """Forget idle workers that died, stop removable ones, and start those that are needed."""
        for name in self._workers.dead(scheduler.next_workers()):
            scheduler.leave(name)
            self._workers.stop(name)
        wanted = scheduler.wanted()
        for name in self._workers.removable(scheduler.spare(), wanted):
            scheduler.leave(name)
            self._workers.stop(name)
        self._workers.start_workers(wanted)

    def _start(self, assignment: Assignment, scheduler: Scheduler[T]) -> None:
        """Start an item, unless another run computes the same."""
        item, number = assignment.item, assignment.number
        runner = self._session.acquire(item)
        if runner is None:
            scheduler.defer(assignment)
            return
        self._events(Started(item.key, item.num_steps, number))
        self._timeline.add(
            "start",
            task=number,
            chain=assignment.chain,
            stage=assignment.stage,
            item=item.key,
            workers=assignment.workers,
            attempt=assignment.attempt,
            macs=item.cost,
        )
        if item.service is not None:
            actor = self._service_actors[item.service]
            refs = [actor.run.remote(item, self._events.remote, number)]
        else:
            actors = self._workers.actors(assignment.workers)
            refs = [
                actor.run.remote(item, runner, number, rank)
                for actor, rank in zip(actors, _ranks(actors), strict=True)
            ]
        pending = dict(zip(refs, assignment.workers or ("",), strict=True))
        self._running[number] = _Running(assignment, refs[0], pending)

    def _wait(self, scheduler: Scheduler[T]) -> None:
        """Wait until something happens, and pass it to the scheduler."""
        pending = {ref: running for running in self._running.values() for ref in running.pending}
        starting = set(self._workers.starting())
        refs = [*pending, *starting]
        if not refs:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            return
        ray.wait(refs, num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
            if ref in starting:
                name = self._workers.register(ref)
                if name is not None:
                    scheduler.join(name, self._workers.ready()[name])
            elif pending[ref].assignment.number in self._running:  # no other of its workers failed
                self._take(ref, pending[ref], scheduler)

    def _take(self, ref: ray.ObjectRef, running: _Running, scheduler: Scheduler[T]) -> None:
        """Process the answer of one of an item's workers; the item ends with the last one's."""
        if _error_of(ref) is not None:
            self._fail(running, scheduler)
            return
        del running.pending[ref]
        if not running.pending:
            result = ray.get(running.result)
            self._end(running.assignment, "done")
            self._workers.mark_idle(running.assignment.workers)
            scheduler.finish(running.assignment, result)

    def _fail(self, running: _Running, scheduler: Scheduler[T]) -> None:
        """Determine why an item failed, stop its workers, and let the scheduler decide.

        An item's only worker stays, unless it was lost; several (see ``as_rank``) are replaced.
        """
        assignment, refs = running.assignment, list(running.pending)
        done, silent = ray.wait(refs, num_returns=len(refs), timeout=SECONDS_TO_FAIL)
        errors = {ref: error for ref in done if (error := _error_of(ref)) is not None}
        cause = min(errors.values(), key=_rank_as_cause)
        lost = [running.pending[ref] for ref in [*errors, *silent] if _is_lost(errors.get(ref))]
        lost = [name for name in lost if name]
        failure = _failure_of(cause, node_lost=self._lost_a_node(lost))
        error = cause.cause if isinstance(cause, RayTaskError) else cause
        reason = f"{type(error).__name__}: {error}"
        what = f"failed ({reason})"
        if not isinstance(cause, RayTaskError) and (lost or assignment.item.service):
            reason = f"its worker died {assignment.attempt} times: {cause}"
            what = "lost its worker"
        stopped = lost if len(assignment.workers) == 1 else assignment.workers
        for name in stopped:
            self._workers.stop(name)
        self._workers.mark_idle(name for name in assignment.workers if name not in stopped)
        self._end(assignment, failure.value)
        action = scheduler.fail(assignment, failure, reason, stopped)
        key, attempt = assignment.item.key, assignment.attempt
        logger.warning("%s %s (attempt %d); %s", key, what, attempt, CONSEQUENCES[action])

    def _lost_a_node(self, lost: list[str]) -> bool:
        """Whether workers were lost with their node, which may end a moment after them."""
        if lost:
            time.sleep(SECONDS_UNTIL_GONE)
        return not all(is_alive(node) for node in self._workers.nodes(lost))

    def _end(self, assignment: Assignment, outcome: str) -> None:
        del self._running[assignment.number]
        self._session.release(assignment.item)
        self._events(Finished(assignment.item.key, assignment.number))
        self._timeline.add("end", task=assignment.number, outcome=outcome)


def _ranks(actors: list[Any]) -> list[Rank | None]:
    """Return the ranks of an item's workers; one alone needs none."""
    if len(actors) == 1:
        return [None]
    try:
        address: str = ray.get(actors[0].address.remote(), timeout=SECONDS_TO_MEET)
    except (RayActorError, GetTimeoutError):
        address = ""  # it died or hangs: so the items fail, too, and are handled as others
    return [Rank(index, len(actors), address) for index in range(len(actors))]


def _error_of(ref: ray.ObjectRef) -> RayError | None:
    """Return what a finished call raised, or None if it returned."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _is_lost(error: RayError | None) -> bool:
    """Whether a worker is gone, or hangs, and not just its item."""
    return error is None or isinstance(error, RayActorError | OutOfMemoryError)


def _rank_as_cause(error: RayError) -> int:
    """Order errors of several workers: the others fail only because one of them did."""
    if _is_lost(error):
        return 0
    failure = _failure_of(error, node_lost=False)
    return [Failure.OUT_OF_MEMORY, Failure.PERMANENT, Failure.TRANSIENT].index(failure) + 1


def _failure_of(error: RayError, *, node_lost: bool) -> Failure:
    if isinstance(error, RayActorError):
        return Failure.NODE_LOST if node_lost else Failure.WORKER_LOST
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, TdcError) and not isinstance(cause, StorageFailedError):
        return Failure.PERMANENT
    if isinstance(cause, OutOfMemoryError) or is_out_of_memory(cause):
        return Failure.OUT_OF_MEMORY
    return Failure.TRANSIENT


def _warn_of_waiting(scheduler: Scheduler[Any]) -> None:
    wishes = [f"{number} of {needs(kind)}" for kind, number in scheduler.wanted().items()]
    logger.warning(
        "work waits for actors: %s could be used, and not enough are free on the nodes %s; it "
        "goes on when there is room",
        " and ".join(wishes),
        node_resources(),
    )

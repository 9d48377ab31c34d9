"""The actors of a pool: started when nodes join, removed when nodes leave."""

import itertools
import logging
import math
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.errors import ClusterError
from tdc_ray.execution.events import EventSink, ignore, reporter
from tdc_ray.execution.item import AnyItem, Resources, Runner, actor_resources
from tdc_ray.execution.ray.cluster import check_room, is_local, node_resources
from tdc_ray.execution.ray.data_parallel import Rank, as_rank
from tdc_ray.execution.scheduler import num_fitting
from tdc_ray.execution.timeline import Timeline
from tdc_ray.storage.fence import Fence, adopt, fences

logger = logging.getLogger(__name__)

MAX_ACTORS = 64
"""Most actors that are started where ``compute.num_actors`` does not say how many."""

MAX_FAILED_STARTS = 10
"""Actors in a row that may die before they are ready."""

SECONDS_IDLE = 1.0
"""Longest idle time after which a worker is assumed alive without asking."""

SECONDS_TO_ANSWER = 5.0
"""Longest time that its answer may then take."""

SECONDS_TO_START = 20.0
"""Time after which a worker that is not ready is assumed to lack room."""

SECONDS_UNTIL_RELEASED = 60.0
"""Longest idle time of a worker on a cluster that others run: it keeps a node from being
removed."""


class _Worker:
    """A process that runs items, one at a time."""

    def __init__(
        self, num_threads: int, events: EventSink, fences: Sequence[Fence], *, tf32: bool
    ) -> None:
        adopt(fences)
        # Imports torch, which the driver of a pool may do without.
        from tdc_ray.execution.device import configure_worker

        configure_worker(num_threads, tf32=tf32)
        self.events = events

    def node(self) -> str:
        """Return the node's name; an answer also shows that the worker is alive."""
        return str(ray.get_runtime_context().get_node_id())

    def address(self) -> str:
        """Return an address at which other workers reach this one, on a port that is free."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"

    def run(self, item: AnyItem, run: Runner, number: int, rank: Rank | None) -> Any:
        if rank is None:
            return run(item, reporter(self.events, item.key, number))
        is_first = rank.index == 0
        with as_rank(rank):
            report = reporter(self.events if is_first else ignore, item.key, number)
            return run(item, report, is_first=is_first)


@dataclass(slots=True)
class _WorkerHandle:
    """A worker, from when it was started."""

    actor: ActorHandle
    resources: Resources
    node: str | None = None
    """None until it is ready."""

    started: float = field(default_factory=time.monotonic)
    idle_since: float = 0.0


class WorkerGroup:
    """Workers, by name."""

    def __init__(self, compute: ComputeConfig, events: EventSink, timeline: Timeline) -> None:
        self.default = default_resources(compute)
        """Resources of a worker for items that name none."""

        self._compute, self._events, self._timeline = compute, events, timeline
        self._workers: dict[str, _WorkerHandle] = {}
        self._starting: dict[ray.ObjectRef, str] = {}
        self._numbers, self._failed_starts = itertools.count(), 0
        self._last_failed_start = -math.inf

    def ready(self) -> dict[str, Resources]:
        """Return the workers that are ready, with their resources."""
        return {name: worker.resources for name, worker in self._workers.items() if worker.node}

    def starting(self) -> list[ray.ObjectRef]:
        """Return the references that resolve when one of the others is ready."""
        return list(self._starting)

    def actors(self, names: Iterable[str]) -> list[Any]:
        """Return the actor handles of workers."""
        return [self._workers[name].actor for name in names]

    def nodes(self, names: Iterable[str]) -> set[str]:
        """Return the names of the nodes of workers that are ready."""
        return {self._workers[name].node or "" for name in names}

    def start_workers(self, wanted: Mapping[Resources, int]) -> None:
        """Start actors for items that could run at once, as far as there is, or may be, room."""
        for resources, number in wanted.items():
            have = sum(worker.resources == resources for worker in self._workers.values())
            room = (self._compute.num_actors or MAX_ACTORS) - len(self._workers)
            for _ in range(min(number - have, self.most(resources) - have, room)):
                self._start_worker(resources)

    def removable(
        self, spare: Mapping[str, Resources], wanted: Mapping[Resources, int]
    ) -> list[str]:
        """Return the names of the spare workers to stop: they block others, or keep idle nodes.

        Args:
            spare: Idle workers that nothing is ready for.
            wanted: Workers of each kind that all items which run or could run need.
        """
        latest = time.monotonic() - SECONDS_TO_START
        present = (one for one in self._workers.values() if one.node or one.started > latest)
        counts = Counter(worker.resources for worker in present)
        missing = {
            kind: min(number, self.most(kind)) - counts[kind] for kind, number in wanted.items()
        }
        removable = []
        for name, resources in spare.items():
            others = [kind for kind in missing if kind != resources and missing[kind] > 0]
            if others:  # it may be in their room
                missing[others[0]] -= 1
                removable.append(name)
            elif self._idle_seconds(name) > SECONDS_UNTIL_RELEASED and not is_local():
                removable.append(name)
        return removable

    def register(self, ref: ray.ObjectRef) -> str | None:
        """Return the name of a worker that answers that it is ready; None means that it died.

        Raises:
            ClusterError: Too many workers died in a row.
        """
        name = self._starting.pop(ref)
        try:
            node: str = ray.get(ref)
        except RayError as error:
            self.stop(name)
            now = time.monotonic()  # many at once, of a node that died, count as one
            self._failed_starts += now - self._last_failed_start > SECONDS_TO_ANSWER
            self._last_failed_start = now
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ClusterError(
                    f"{self._failed_starts} actors in a row died as they started. The last one: "
                    f"{error}"
                ) from error
            return None
        self._failed_starts = 0
        self._workers[name].node = node
        self.mark_idle([name])
        self._timeline.add("join", worker=name, node=node)
        return name

    def mark_idle(self, names: Iterable[str]) -> None:
        """Note that workers are idle from now on."""
        for name in names:
            self._workers[name].idle_since = time.monotonic()

    def dead(self, names: Iterable[str]) -> list[str]:
        """Return the names of the workers that do not answer, of those that were idle for a while.

        An item on a worker that died before it would count as a failure of the item.
        """
        asked: dict[ray.ObjectRef, str] = {}
        for name in names:
            if self._idle_seconds(name) > SECONDS_IDLE:
                actor: Any = self._workers[name].actor
                asked[actor.node.remote()] = name
        if not asked:
            return []
        answers, silent = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
        dead = [asked[ref] for ref in silent]
        for ref in answers:
            try:
                ray.get(ref)
            except RayActorError:
                dead.append(asked[ref])
        self.mark_idle(asked[ref] for ref in answers)
        return dead

    def stop(self, name: str) -> None:
        """End a worker; one that is lost may be alive but out of reach."""
        worker = self._workers.pop(name, None)
        if worker is None:
            return
        self._starting = {ref: other for ref, other in self._starting.items() if other != name}
        ray.kill(worker.actor)
        if worker.node is not None:
            self._timeline.add("leave", worker=name)

    def stop_all(self) -> None:
        """End all workers."""
        for name in list(self._workers):
            self.stop(name)

    def _idle_seconds(self, name: str) -> float:
        return time.monotonic() - self._workers[name].idle_since

    def most(self, resources: Resources) -> int:
        """Return how many actors of a kind to ask for.

        A cluster that others started may grow: there those that do not fit wait for room.
        """
        fits, wanted = num_fitting(node_resources(), needs(resources)), self._compute.num_actors
        if is_local():
            return min(fits, wanted or MAX_ACTORS)
        return wanted or min(max(fits, self._compute.workers_per_finetune), MAX_ACTORS)

    def _start_worker(self, resources: Resources) -> None:
        remote: Any = ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(_Worker)
        num_threads = max(1, int(resources.cpus))
        actor = remote.remote(num_threads, self._events, fences(), tf32=self._compute.tf32)
        name = f"worker-{next(self._numbers)}"
        self._workers[name] = _WorkerHandle(actor, resources)
        self._starting[actor.node.remote()] = name


def default_resources(compute: ComputeConfig) -> Resources:
    """Return the resources of a worker for items that name none."""
    gpus = compute.gpus_per_measurement
    training = actor_resources(compute)
    return training if gpus is None else Resources(compute.cpus_per_actor, gpus)


def check_capacity(compute: ComputeConfig) -> None:
    """Check that the workers of every item of a pool have room.

    Raises:
        ClusterError: They have no room, and no node will join.
    """
    training = actor_resources(compute)
    kinds = (default_resources(compute), 1), (training, compute.workers_per_finetune)
    names = ("cpus_per_actor", "gpus_per_actor", "workers_per_finetune", "num_actors")
    settings = ", ".join(f"compute.{name}" for name in names)
    for resources, number in kinds:
        check_room(number, needs(resources), settings, compute.num_actors or 0)


def needs(resources: Resources) -> dict[str, float]:
    """Return resources by Ray's names."""
    return {"CPU": resources.cpus, "GPU": resources.gpus}

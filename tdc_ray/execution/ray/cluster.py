"""Connects to Ray, and brings what workers report back to the driver."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tdc_ray.execution.item import Report
from tdc_ray.reporting.progress import Event, ProgressView

OBJECT_STORE_BYTES = 256 * 1024**2
"""Object store of a local Ray; items carry paths and small values, so little goes through it."""

LOCAL = "tdc-ray-local"
"""Ray's namespace of a local Ray."""

SECONDS_BETWEEN_LOOKS = 0.5

FAILURES_UNTIL_SAID = 5
"""In a row, until the log says that it may be more than the board; each takes some seconds."""

SECONDS_TO_ANSWER = 2.0
"""How long a node may take to say that it is alive."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def connected(num_cpus: int | None = None, *, dashboard: bool = False) -> Iterator[None]:
    """Use the cluster that ``RAY_ADDRESS`` names, or the one already joined, or a local one.

    Args:
        num_cpus: Logical CPUs of a local Ray; None: as many as the machine has.
        dashboard: Whether a local Ray has one, on loopback: without it Ray Train never finds out
            that who led a training was killed, and keeps the CPUs of that.
    """
    if ray.is_initialized():
        yield
        return
    # Ray Train's controller looks at its workers this often; a report waits for the next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: Any = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    if "RAY_ADDRESS" in os.environ:
        ray.init(**common)
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            namespace=LOCAL,
            object_store_memory=OBJECT_STORE_BYTES,
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()


def node_resources() -> list[dict[str, float]]:
    """Give the resources of every node that is alive, taken or not."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def is_alive(node_id: str) -> bool:
    """Ask a node itself whether it is alive: Ray knows of its end only after many seconds."""
    for node in ray.nodes():
        if node["NodeID"] == node_id and node["Alive"]:
            address = (node["NodeManagerAddress"], node["NodeManagerPort"])
            with contextlib.suppress(OSError):
                socket.create_connection(address, timeout=SECONDS_TO_ANSWER).close()
                return True
    return False


def is_local() -> bool:
    """Whether the cluster is one that this process started for itself: no node will join it.

    A trial of a sweep is an actor, and shares the cluster with others.
    """
    context = ray.get_runtime_context()
    return bool(context.namespace == LOCAL) and context.get_actor_id() is None


class _EventBuffer:
    """Holds events until the driver fetches them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        self.events.append(event)

    def drain(self) -> list[Event]:
        events, self.events = self.events, []
        return events


class EventCollector:
    """The driver's end: fetches events in a thread and shows them. Sendable to workers."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor
        self._failures = 0

    def reporter(self, key: str, task: int | None = None) -> Report:
        """Make the function through which a piece of work reports; it never waits."""

        def report(metrics: Mapping[str, float], step: int) -> None:
            self._actor.add.remote(Event(key, step, dict(metrics), task=task))

        return report

    def add_images(self, key: str, step: int, images: NDArray[np.uint8]) -> None:
        """Report a grid of images, ``(B, H, W, C)``."""
        self._actor.add.remote(Event(key, step, {}, images))

    def show(self, view: ProgressView) -> None:
        """Fetch what came in and show it; a board that died is no reason to stop the work."""
        try:
            events: list[Event] = ray.get(self._actor.drain.remote())
        except RayActorError:
            self._failures += 1
            if self._failures == 1:
                logger.warning("the progress board died; it starts again, what it held is lost")
            elif self._failures == FAILURES_UNTIL_SAID:
                logger.warning(
                    "the Ray cluster does not answer. Ray gives its head a minute, then ends this "
                    "process; the same command goes on from there on another cluster"
                )
            return
        self._failures = 0
        for event in events:
            view.show(event)


@contextlib.contextmanager
def board(view: ProgressView) -> Iterator[EventCollector]:
    """Start a board on the driver's node and show what it gets for as long as needed."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, max_restarts=-1)(_EventBuffer)
    actor: Any = remote.options(scheduling_strategy=here).remote()
    handle, stop = EventCollector(actor), threading.Event()

    def watch() -> None:
        while not stop.wait(SECONDS_BETWEEN_LOOKS):
            handle.show(view)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield handle
        stop.set()
        thread.join()
        handle.show(view)
    finally:
        stop.set()
        ray.kill(actor)

"""Forwards what workers report to the sinks of the driver."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from tdc_ray.execution.events import EventSink, Sinks, listening
from tdc_ray.execution.interrupts import received_signal
from tdc_ray.execution.ray.cluster import actor_here

SECONDS_BETWEEN_FETCHES = 0.5

FAILURES_UNTIL_WARNING = 5
"""Failures in a row after which a warning is logged; each takes some seconds."""

logger = logging.getLogger(__name__)


class _EventBuffer:
    """Holds events until the driver fetches them."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def add(self, event: object) -> None:
        self.events.append(event)

    def drain(self) -> list[object]:
        events, self.events = self.events, []
        return events


def _send(buffer: ActorHandle, event: object) -> None:
    buffer.add.remote(event)  # without waiting


class EventCollector(Sinks):
    """The driver's sinks, to which the events of workers are forwarded too."""

    def __init__(self, sinks: Sequence[EventSink], buffer: ActorHandle) -> None:
        super().__init__(sinks)
        self.remote: EventSink = partial(_send, buffer)
        """The sink that is sent to workers."""

        self._buffer, self._failures = buffer, 0

    def forward(self) -> None:
        """Forward new events; a buffer that died is no reason to stop the work."""
        try:
            events: list[object] = ray.get(self._buffer.drain.remote())
        except RayActorError:
            self._failures += 1
            if received_signal() is not None:  # it ends with all else
                return
            if self._failures == 1:
                logger.warning("the event buffer died; it starts again, what it held is lost")
            elif self._failures == FAILURES_UNTIL_WARNING:
                logger.warning(
                    "the Ray cluster does not answer. Ray gives its head a minute, then ends this "
                    "process; the same command resumes on another cluster"
                )
            return
        self._failures = 0
        for event in events:
            self(event)


@contextmanager
def collecting(sinks: Sequence[EventSink]) -> Iterator[EventCollector]:
    """Enter sinks, and forward to them what workers report, while the block runs."""
    buffer, stop = actor_here(_EventBuffer).remote(), threading.Event()

    def forward() -> None:
        while not stop.wait(SECONDS_BETWEEN_FETCHES):
            events.forward()

    with listening(sinks):
        events = EventCollector(sinks, buffer)
        thread = threading.Thread(target=forward, name="events", daemon=True)
        thread.start()
        try:
            yield events
            stop.set()
            thread.join()
            events.forward()
        finally:
            stop.set()
            ray.kill(buffer)

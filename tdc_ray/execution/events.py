"""Events of work in progress: it began, it reported, it ended. Sinks show or record them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdc_ray.execution.item import Report, StepMetrics

EventSink = Callable[[object], None]
"""Is called with events of any type, from any thread, and ignores those that it does not know. One
that is a context manager is entered for as long as events may come."""


@dataclass(frozen=True, slots=True)
class Started:
    """A piece of work began."""

    key: str
    """Its name, such as ``base`` or ``group-03/finetune``."""

    num_steps: int
    number: int | None = None
    """Which attempt at it, where several of the same name may run."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A piece of work reported."""

    key: str
    step: int
    metrics: Mapping[str, float]
    images: NDArray[np.uint8] | None = None
    """A grid's images, ``(B, H, W, C)``."""

    number: int | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A piece of work ended, done or not."""

    key: str
    number: int | None = None


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[EventSink]) -> None:
        self._sinks = tuple(sinks)

    def __call__(self, event: object) -> None:
        """Pass an event on, in the order of the sinks."""
        for sink in self._sinks:
            sink(event)

    @contextmanager
    def recording(self, key: str) -> Iterator[list[StepMetrics]]:
        """Collect what a piece of work reports while the block runs."""
        reported: list[StepMetrics] = []

        def record(event: object) -> None:
            if isinstance(event, Reported) and event.key == key and event.metrics:
                reported.append((event.step, event.metrics))

        self._sinks = (*self._sinks, record)
        try:
            yield reported
        finally:
            self._sinks = tuple(sink for sink in self._sinks if sink is not record)


@contextmanager
def listening(sinks: Sequence[EventSink]) -> Iterator[Sinks]:
    """Enter sinks while the block runs, and yield them as one."""
    with ExitStack() as stack:
        for sink in sinks:
            if isinstance(sink, AbstractContextManager):
                stack.enter_context(sink)
        yield Sinks(sinks)


def ignore(_event: object) -> None:
    """Ignore an event."""


def reporter(sink: EventSink, key: str, number: int | None = None) -> Report:
    """Return the function through which a piece of work reports to a sink."""

    def report(metrics: Mapping[str, float], step: int) -> None:
        sink(Reported(key, step, dict(metrics), number=number))

    return report

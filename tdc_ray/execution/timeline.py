"""A run's timeline: who ran which item when; written as it happens, and summed up."""

import logging
import os
import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from tdc_ray.errors import StorageError
from tdc_ray.storage.files import append_json_line, read_json_lines

logger = logging.getLogger(__name__)


class Timeline:
    """Appends what one driver does to a file, several events in a line."""

    def __init__(self, path: Path | None) -> None:
        """Open the file for a new driver; None means that nothing is kept."""
        self._path, self._driver = path, secrets.token_hex(4)
        self._events: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self.add("driver", host=socket.gethostname(), pid=os.getpid())

    def add(self, event: str, **details: Any) -> None:
        """Add an event that happens now."""
        self._events.append(
            {"event": event, "time": time.time(), "driver": self._driver, **details}
        )

    def flush(self, max_age_s: float = 0.0) -> None:
        """Write what is not yet written, unless that was done a moment ago.

        What the storage fails to write is kept for the next time: no work ends because of it.
        """
        if time.monotonic() - self._flushed < max_age_s:
            return
        self._flushed = time.monotonic()
        if self._path is not None and self._events:
            try:
                append_json_line(self._path, self._events)
            except StorageError as error:
                logger.warning("%s", error)
                return
        self._events = []


@dataclass(frozen=True, slots=True)
class Span:
    """One attempt at an item; times are seconds since the epoch."""

    phase: str
    chain: str
    stage: int
    """Stage of its chain: items of one stage may run side by side."""

    item: str
    workers: tuple[str, ...]
    """Empty means that a service ran it."""

    attempt: int
    started: float
    ended: float | None = None
    """None means that it still runs."""

    outcome: str = "running"
    """``done``, ``running``, or a failure's name, such as ``worker_lost``."""

    macs: float = 0.0
    """Expected macs of the item; 0 in timelines of older versions."""


@dataclass(frozen=True, slots=True)
class Stay:
    """A worker's time on a node; times are seconds since the epoch."""

    worker: str
    node: str
    joined: float
    left: float | None = None


@dataclass(frozen=True, slots=True)
class History:
    """What a timeline holds, over all drivers of the run."""

    spans: tuple[Span, ...]
    """In the order in which they began."""

    stays: tuple[Stay, ...]
    failed: Mapping[str, str]
    """Chains that failed under the last driver, with the reasons."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerUsage:
    """How well the workers of a phase were used."""

    phase: str
    """``experts`` or ``evaluation``, and such."""

    num_workers: int
    """Most workers at any time."""

    makespan_seconds: float
    """From the first start to the last end, times without a driver included."""

    lower_bound_seconds: float
    """No order could be faster: the larger of the work per worker and the longest chain."""

    work_seconds: float
    """Time of items that were finished, summed over their workers."""

    lost_seconds: float
    """Time of attempts that were not."""

    utilisation: float
    """Share of the workers' time that they spent on items."""


@dataclass(frozen=True, slots=True)
class _Event:
    """What a line says of one event; which of the fields are set depends on its kind."""

    event: str
    time: FiniteFloat
    driver: str | None = None
    name: str = ""
    worker: str = ""
    node: str = ""
    task: int = -1
    chain: str = ""
    stage: int = 0
    item: str = ""
    workers: tuple[str, ...] = ()
    attempt: int = 1
    macs: FiniteFloat = 0.0
    outcome: str = ""
    reason: str = ""


_ADAPTER = TypeAdapter(list[_Event])


def load_history(path: Path) -> History:
    """Read what a :class:`Timeline` wrote; what a killed driver left open ends with it.

    Lines may be torn: ends without a start are left out. Lines that hold something else than
    events are left out with a warning: a timeline is for reading, and no work depends on it.
    """
    spans: list[Span] = []
    stays: list[Stay] = []
    running: dict[int, Span] = {}
    present: dict[str, Stay] = {}
    failed: dict[str, str] = {}
    phase, last, driver = "", 0.0, None
    for event in _read(path):
        kind, time = event.event, event.time
        if kind == "driver":
            driver = event.driver
            spans += [replace(one, ended=last, outcome="driver_lost") for one in running.values()]
            stays += [replace(one, left=last) for one in present.values()]
            for of_driver in (running, present, failed):
                of_driver.clear()
        elif event.driver != driver:
            continue  # of a driver that was suspended and wrote after another took over
        elif kind == "phase":
            phase = event.name
        elif kind == "join":
            present[event.worker] = Stay(event.worker, event.node, time)
        elif kind == "leave":
            if stay := present.pop(event.worker, None):
                stays.append(replace(stay, left=time))
        elif kind == "start":
            running[event.task] = Span(
                phase=phase,
                chain=event.chain,
                stage=event.stage,
                item=event.item,
                workers=event.workers,
                attempt=event.attempt,
                started=time,
                macs=event.macs,
            )
        elif kind == "end":
            if ended := running.pop(event.task, None):
                spans.append(replace(ended, ended=time, outcome=event.outcome))
        elif kind == "failed":
            failed[event.chain] = event.reason
        last = time
    spans += running.values()
    stays += present.values()
    return History(tuple(sorted(spans, key=lambda span: span.started)), tuple(stays), failed)


def _read(path: Path) -> Iterator[_Event]:
    """Yield the events of all lines that hold some."""
    for line in read_json_lines(path):
        try:
            yield from _ADAPTER.validate_python(line)
        except ValidationError as error:
            logger.warning("a line of %s holds no events: left out (%s)", path, error)


def worker_rows(history: History) -> tuple[list[Stay], list[tuple[int, Span]]]:
    """Return the stays as rows of a picture, and the row of each span's every worker.

    Workers' names begin anew with every driver: a span is in the latest row of its worker's name.
    """
    stays = sorted(history.stays, key=lambda stay: stay.joined)
    rows = []
    for span in history.spans:
        earlier = {s.worker: row for row, s in enumerate(stays) if s.joined <= span.started}
        rows += [(earlier.get(worker, 0), span) for worker in span.workers]
    return stays, rows


def usage(history: History) -> list[WorkerUsage]:
    """Return how well each phase used its workers, in the order in which they began."""
    phases = dict.fromkeys(span.phase for span in history.spans)
    return [
        _usage(phase, [span for span in history.spans if span.phase == phase], history.stays)
        for phase in phases
    ]


def lower_bound(
    stages: Mapping[tuple[str, int], float], work_seconds: float, num_workers: int
) -> float:
    """Return how long work must take at least: the longest chain, or all of it side by side.

    Args:
        stages: Seconds of the longest item of every stage, by chain and number of the stage.
        work_seconds: Time of all items, summed over their workers.
        num_workers: Workers that share them.
    """
    chains: dict[str, float] = defaultdict(float)
    for (chain, _), seconds in stages.items():
        chains[chain] += seconds
    return max(max(chains.values(), default=0.0), work_seconds / max(num_workers, 1))


def _usage(phase: str, spans: list[Span], stays: Iterable[Stay]) -> WorkerUsage:
    ended = [(span, span.ended) for span in spans if span.ended is not None and span.workers]
    first = min((span.started for span, _ in ended), default=0.0)
    last = max((end for _, end in ended), default=0.0)
    stages: dict[tuple[str, int], float] = {}
    work = lost = 0.0
    for span, end in ended:
        seconds = end - span.started
        if span.outcome == "done":
            stage = (span.chain, span.stage)
            stages[stage] = max(stages.get(stage, 0.0), seconds)
            work += seconds * len(span.workers)
        else:
            lost += seconds * len(span.workers)
    present = [
        (max(stay.joined, first), min(stay.left or last, last))
        for stay in stays
        if stay.joined < last and (stay.left or last) > first
    ]
    most = max((sum(a <= start < b for a, b in present) for start, _ in present), default=0)
    total = sum(end - start for start, end in present)
    return WorkerUsage(
        phase=phase,
        num_workers=most,
        makespan_seconds=last - first,
        lower_bound_seconds=lower_bound(stages, work, most),
        work_seconds=work,
        lost_seconds=lost,
        utilisation=min(1.0, (work + lost) / total) if total else 0.0,
    )

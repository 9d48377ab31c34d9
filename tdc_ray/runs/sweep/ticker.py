"""Emits how far a sweep is, every few seconds: its trials run in other processes, unseen."""

import threading
import time

from tdc_ray.execution.events import EventSink
from tdc_ray.runs.sweep.results import SweepProgress
from tdc_ray.runs.sweep.table import SweepTable

SECONDS_BETWEEN_EVENTS = 6.0
"""Below the 10 s within which a console is to say something."""


class Ticker:
    """Emits :class:`SweepProgress` while it is entered."""

    table: SweepTable | None = None
    """The rows, once there are some."""

    def __init__(self, events: EventSink, num_runs: int) -> None:
        self._events, self._num_runs = events, num_runs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="ticker", daemon=True)

    def __enter__(self) -> "Ticker":
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_EVENTS):
            rows = () if self.table is None else self.table.results.rows
            seconds = time.perf_counter() - self._started
            self._events(SweepProgress(rows, self._num_runs, seconds))

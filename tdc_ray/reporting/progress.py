"""Shows the progress of long work: bars in a terminal, else lines in the log."""

import logging
import math
import threading
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tdc_ray.execution.events import Finished, Reported, Started
from tdc_ray.reporting.text import duration
from tdc_ray.runs.sweep.results import SweepProgress, TrialRow

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""Least time between two lines of a piece of work without a terminal."""


class ProgressBars:
    """A sink that shows the progress of each piece of work."""

    def __init__(self, console: Console) -> None:
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=3600,  # whose steps take long report seldom
            disable=not self._live,
        )
        self._tasks: dict[int | str, Task] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: object) -> None:
        """Update the display."""
        with self._lock:
            match event:
                case Started(key, num_steps):
                    self._bars.add_task(key, total=num_steps, note="", written=-math.inf)
                    self._tasks[_name(event)] = self._bars.tasks[-1]
                case Reported() if task := self._tasks.get(_name(event)):
                    self._update(task, event)
                case Finished(key) if task := self._tasks.pop(_name(event), None):
                    self._bars.remove_task(task.id)
                    if not self._live and (task.elapsed or 0.0) >= 1:
                        # It may have failed.
                        logger.info("%s ended after %.0f s", key, task.elapsed)

    def _update(self, task: Task, event: Reported) -> None:
        names = (name for name in ("loss", "loss_refit", "loss_cut") if name in event.metrics)
        note = next((f" {name} {event.metrics[name]:.4f}" for name in names), "")
        self._bars.update(task.id, completed=event.step, note=note or task.fields["note"])
        now = task.get_time()
        if not self._live and note and now - task.fields["written"] >= SECONDS_BETWEEN_LINES:
            self._bars.update(task.id, written=now)
            seconds, left = task.time_remaining, ""
            if seconds:
                left = (
                    f", {seconds / 60:.1f} min left"
                    if seconds >= 60
                    else f", {seconds:.0f} s left"
                )
            logger.info("%s step %d/%d%s%s", event.key, event.step, task.total, note, left)


class SweepLine:
    """A sink that says how far a sweep is: in a line that stays in a terminal, else in the log."""

    def __init__(self, console: Console) -> None:
        self._status = console.status("starting") if console.is_terminal else None

    def __enter__(self) -> "SweepLine":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, event: object) -> None:
        """Show the line, or log it."""
        match event:
            case SweepProgress(rows, num_runs, seconds):
                text = sweep_text(rows, num_runs, seconds)
                if self._status is None:
                    logger.info("%s", text)
                else:
                    self._status.update(Text(text))


def sweep_text(rows: Sequence[TrialRow], num_runs: int, seconds: float) -> str:
    """Write how many runs are done, running, failed and stopped, the best score, and the time."""
    counts = Counter(row.status for row in rows)
    parts = [f"{counts['done']} of {num_runs} runs done", f"{counts['running']} running"]
    parts += [f"{counts[name]} {name}" for name in ("failed", "stopped") if counts[name]]
    scored = [(row.score, row) for row in rows if row.status == "done" and row.score is not None]
    if scored:
        score, row = min(scored, key=lambda one: one[0])
        parts.append(f"best {row.metric} {score:.4g} of {row.name}")
    return ", ".join([*parts, f"{duration(seconds)} so far"])


def _name(event: Started | Reported | Finished) -> int | str:
    """Return a name of an event's piece of work: several attempts at one key may run."""
    return event.key if event.number is None else event.number

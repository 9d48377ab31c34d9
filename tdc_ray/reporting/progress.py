"""Shows what long work reports: bars in a terminal, else lines in the log."""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tdc_ray.execution.events import Finished, Reported, Started

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""How often a piece of work may write a line where there is no terminal."""


@dataclass(slots=True)
class _Task:
    num_steps: int
    bar: TaskID
    started: float = field(default_factory=time.monotonic)
    first: tuple[int, float] | None = None
    """Step and time of the first report, from which the speed is estimated."""
    last_line: float = 0.0
    note: str = ""


class ProgressBars:
    """A sink that shows how far each piece of work is."""

    def __init__(self, console: Console) -> None:
        self._live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[int | str, _Task] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: object) -> None:
        """Bring the display up to date."""
        with self._lock:
            match event:
                case Started(key, num_steps):
                    bar = self._bars.add_task(key, total=num_steps, note="")
                    self._tasks[_name(event)] = _Task(num_steps, bar)
                case Reported() if task := self._tasks.get(_name(event)):
                    self._update(task, event)
                case Finished(key) if task := self._tasks.pop(_name(event), None):
                    self._bars.remove_task(task.bar)
                    seconds = time.monotonic() - task.started
                    if not self._live and seconds >= 1:
                        logger.info("%s done in %.0f s", key, seconds)

    def _update(self, task: _Task, event: Reported) -> None:
        note = _note(event.metrics)
        task.note = note or task.note
        self._bars.update(task.bar, completed=event.step, note=task.note)
        now = time.monotonic()
        task.first = task.first or (event.step, now)
        if not self._live and note and now - task.last_line >= SECONDS_BETWEEN_LINES:
            task.last_line = now
            left = _time_left(task, event.step, now)
            logger.info("%s step %d/%d%s%s", event.key, event.step, task.num_steps, note, left)


def _name(event: Started | Reported | Finished) -> int | str:
    """Name what an event is of: several attempts at one key may run."""
    return event.key if event.number is None else event.number


def _note(metrics: Mapping[str, float]) -> str:
    for name in ("loss", "loss_refit", "loss_cut"):
        if name in metrics:
            return f" {name} {metrics[name]:.4f}"
    return ""


def _time_left(task: _Task, step: int, now: float) -> str:
    first_step, first_time = task.first or (step, now)
    if step == first_step or step >= task.num_steps:
        return ""
    seconds = (now - first_time) / (step - first_step) * (task.num_steps - step)
    return f", {seconds / 60:.1f} min left" if seconds >= 60 else f", {seconds:.0f} s left"

"""Shows and records what long work reports: bars in a terminal, lines in a log, TensorBoard."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
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

from tdc_ray.execution.item import AnyItem, Report, Reported
from tdc_ray.storage.mirror import synced_while_growing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
"""How often a piece of work may write a line where there is no terminal."""

SECONDS_BETWEEN_FLUSHES = 10
"""How old what TensorBoard shows may be."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a piece of work reported."""

    key: str
    """The work, such as ``base`` or ``group-03/finetune``."""

    step: int
    metrics: Mapping[str, float]
    images: NDArray[np.uint8] | None = None
    """A grid's images, ``(B, H, W, C)``."""

    task: int | None = None
    """Which attempt at it, where several of the same name may be under way."""

    @property
    def bar(self) -> int | str:
        """Whose bar it moves."""
        return self.key if self.task is None else self.task


@dataclass(slots=True)
class _Task:
    key: str
    num_steps: int
    bar: TaskID
    started: float = field(default_factory=time.monotonic)
    first: tuple[int, float] | None = None
    """Step and time of the first event, from which the speed is reckoned."""
    last_line: float = 0.0
    note: str = ""


class ProgressView:
    """Takes events from any thread; a context manager that ends the display."""

    def __init__(
        self,
        tensorboard_dir: Path,
        console: Console,
        listen: Callable[[Event], None] | None = None,
    ) -> None:
        """Take the folder of TensorBoard's files, the terminal, and who else gets the events."""
        self._dir, self._listen = tensorboard_dir, listen
        self._end = ExitStack()
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
        self._heard: dict[str, list[Reported]] = {}
        self._writers: dict[str, SummaryWriter] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "ProgressView":
        self._dir = self._end.enter_context(synced_while_growing(self._dir))
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
        with self._end:
            for writer in self._writers.values():
                writer.close()

    def start(self, key: str, num_steps: int, task: int | None = None) -> None:
        """Say that a piece of work has begun, and by what number events will name it, if any."""
        with self._lock:
            bar = self._bars.add_task(key, total=num_steps, note="")
            self._tasks[key if task is None else task] = _Task(key, num_steps, bar)

    def finish(self, bar: int | str) -> None:
        """Say that it is done, by its number or key; its bar goes."""
        with self._lock:
            task = self._tasks.pop(bar, None)
            if task is not None:
                self._bars.remove_task(task.bar)
                seconds = time.monotonic() - task.started
                if not self._live and seconds >= 1:
                    logger.info("%s done in %.0f s", task.key, seconds)

    def show_scalars(self, run: str, values: Mapping[str, float], step: int) -> None:
        """Put values into TensorBoard, by their tags."""
        with self._lock:
            self._add_scalars(run, values, step)

    def show_picture(self, run: str, name: str, path: Path) -> None:
        """Put a picture file into TensorBoard."""
        with Image.open(path) as image:
            self.show_images(run, name, np.asarray(image.convert("RGB"))[None])

    def show_images(self, run: str, name: str, images: NDArray[np.uint8]) -> None:
        """Put images, ``(B, H, W, C)``, into TensorBoard."""
        with self._lock:
            self._writer(run, 0).add_images(name, images, 0, dataformats="NHWC")

    def show_text(self, run: str, name: str, text: str, step: int) -> None:
        """Put text, as Markdown, into TensorBoard."""
        with self._lock:
            self._writer(run, step).add_text(name, text, step)

    @contextmanager
    def watch(self, item: AnyItem) -> Iterator[Report]:
        """Show an item that runs in this process."""
        self.start(item.key, item.num_steps)
        try:
            yield lambda metrics, step: self.show(Event(item.key, step, dict(metrics)))
        finally:
            self.finish(item.key)

    @contextmanager
    def heard(self, key: str) -> Iterator[list[Reported]]:
        """Give what a piece of work reports, as it comes in while the block runs."""
        self._heard[key] = []
        try:
            yield self._heard[key]
        finally:
            del self._heard[key]

    def show(self, event: Event) -> None:
        """Record an event and bring the display up to date."""
        if self._listen is not None:
            self._listen(event)
        with self._lock:
            if event.key in self._heard and event.metrics:
                self._heard[event.key].append((event.step, event.metrics))
            self._record(event)
            task = self._tasks.get(event.bar)
            if task is None:
                return
            note = _note(event.metrics)
            task.note = note or task.note
            self._bars.update(task.bar, completed=event.step, note=task.note)
            now = time.monotonic()
            task.first = task.first or (event.step, now)
            if not self._live and note and now - task.last_line >= SECONDS_BETWEEN_LINES:
                task.last_line = now
                left = _time_left(task, event.step, now)
                logger.info("%s step %d/%d%s%s", event.key, event.step, task.num_steps, note, left)

    def _record(self, event: Event) -> None:
        """Write to TensorBoard: one run per group, so that the groups' curves share a plot."""
        if not event.metrics and event.images is None:
            return
        run, _, work = event.key.partition("/")
        searches = ("round", "base", "scores", "sensitivities")
        stage = "prune" if work.startswith(searches) else "train"
        tags = {f"{stage}/{name}": value for name, value in event.metrics.items()}
        self._add_scalars(run, tags, event.step)
        if event.images is not None:
            self._writer(run, event.step).add_images(
                "samples", event.images, event.step, dataformats="NHWC"
            )

    def _add_scalars(self, run: str, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer(run, step).add_scalar(tag, value, step)

    def _writer(self, run: str, step: int) -> "SummaryWriter":
        writer = self._writers.get(run)
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter  # imports torch

            writer = SummaryWriter(
                str(self._dir / run), purge_step=step, flush_secs=SECONDS_BETWEEN_FLUSHES
            )
            self._writers[run] = writer
        return writer


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

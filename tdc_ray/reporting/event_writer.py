"""Turns the events of a run into curves, images and texts, wherever these are written.

One *series* for each group and for other work, with its metrics; ``plan`` has the plan's plot,
``memory`` the losses of the search (tags by group, a step for every candidate), ``proxy`` the
transcripts of a language model (a step for every candidate), ``samples`` the first of the images
that base and experts were scored on, ``workers`` the timeline and the utilisation of workers.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdc_ray.execution.events import Reported
from tdc_ray.pruning.llm.transcripts import transcript_path, transcript_text
from tdc_ray.pruning.memory import MemoryEntry, best
from tdc_ray.reporting.grid import image_grid
from tdc_ray.runs.events import CandidateMeasured, ImagesSampled, PlanMade, WorkersUsed
from tdc_ray.storage.files import exists, fetch
from tdc_ray.storage.run_dir import RunDir

NUM_SAMPLES = 16
"""Images of each model that are shown."""

Key = tuple[int, int, int]
"""Of an entry of the memory bank."""


class EventWriter(ABC):
    """A sink that writes what events show; its pictures are those that sinks before it drew."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._entries: dict[Key, MemoryEntry] = {}
        self._written: frozenset[tuple[Key, float]] = frozenset()
        """Losses that an earlier call wrote, where writing them again would show."""

        self._lock = threading.Lock()

    @abstractmethod
    def _add_scalars(self, series: str, values: Mapping[str, float], step: int) -> None:
        """Write values by tag."""

    @abstractmethod
    def _add_image(self, series: str, tag: str, image: NDArray[np.uint8], step: int = 0) -> None:
        """Write an image, ``(H, W, C)``."""

    @abstractmethod
    def _add_text(self, series: str, tag: str, text: str, step: int) -> None:
        """Write a text."""

    def __call__(self, event: object) -> None:
        """Write the parts of an event that are shown."""
        with self._lock:
            match event:
                case Reported():
                    self._write_report(event)
                case PlanMade():
                    self._add_picture("plan", "plan", self._run_dir.plan_plot)
                case CandidateMeasured(entry, step):
                    self._write_candidate(entry, step)
                case ImagesSampled(model, path):
                    with np.load(fetch(path)) as file:
                        grid = image_grid(file["arr_0"][:NUM_SAMPLES])
                        self._add_image("samples", model, grid)
                case WorkersUsed(_, usage):
                    self._add_picture("workers", "timeline", self._run_dir.timeline_plot)
                    for part in usage:
                        values = {
                            f"{part.phase}/utilisation": part.utilisation,
                            f"{part.phase}/makespan_seconds": part.makespan_seconds,
                        }
                        self._add_scalars("workers", values, 0)

    def _write_report(self, event: Reported) -> None:
        """Use one series per group, so that the groups' curves share a plot."""
        series, _, work = event.key.partition("/")
        searches = ("round", "base", "scores", "sensitivities")
        stage = "prune" if work.startswith(searches) else "train"
        tags = {f"{stage}/{name}": value for name, value in event.metrics.items()}
        if tags:
            self._add_scalars(series, tags, event.step)
        if event.images is not None:
            self._add_image(series, "samples", image_grid(event.images), event.step)

    def _write_candidate(self, entry: MemoryEntry, step: int) -> None:
        self._entries[entry.key] = entry
        if (entry.key, entry.loss) in self._written:
            return
        earlier = [
            one
            for one in self._entries.values()
            if one.group == entry.group and one.key <= entry.key
        ]
        name = f"group-{entry.group:02d}"
        losses = {f"{name}/loss": entry.loss, f"{name}/best_loss": best(earlier).loss}
        self._add_scalars("memory", losses, step)
        transcript = transcript_path(self._run_dir.transcripts, entry.group, entry.round)
        if exists(transcript):
            self._add_text("proxy", name, transcript_text(transcript), step)

    def _add_picture(self, series: str, tag: str, path: Path) -> None:
        with Image.open(fetch(path)) as image:
            self._add_image(series, tag, np.asarray(image.convert("RGB")))

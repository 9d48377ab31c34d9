"""Writes the events of a run as TensorBoard's event files.

TensorBoard's runs, in the run directory's ``tensorboard``: one for each group and for other work,
with its metrics; ``plan`` has the plan's plot, ``memory`` the losses of the search (tags by group,
a step for every candidate), ``proxy`` the transcripts of a language model (a step for every
round), ``samples`` the first of the images that base and experts were scored on, ``workers`` the
timeline and the utilisation of workers.
"""

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdc_ray.execution.events import Reported
from tdc_ray.pruning.llm.transcripts import transcript_path, transcript_text
from tdc_ray.pruning.memory import MemoryEntry, best
from tdc_ray.reporting.grid import image_grid
from tdc_ray.runs.events import CandidateMeasured, ImagesSampled, PlanMade, WorkersUsed
from tdc_ray.storage.files import exists, fetch
from tdc_ray.storage.mirror import synced_while_growing
from tdc_ray.storage.run_dir import RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NUM_SAMPLES = 16
"""Images of each model that are shown."""

SECONDS_BETWEEN_FLUSHES = 10
"""Greatest age of what TensorBoard shows."""


class TensorBoard:
    """A sink that writes event files; its pictures are those that other sinks drew before it."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir, self._end = run_dir, ExitStack()
        self._writers: dict[str, SummaryWriter] = {}
        self._entries: dict[tuple[int, int, int], MemoryEntry] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "TensorBoard":
        self._dir = self._end.enter_context(synced_while_growing(self._run_dir.tensorboard))
        return self

    def __exit__(self, *_: object) -> None:
        with self._end:
            for writer in self._writers.values():
                writer.close()

    def __call__(self, event: object) -> None:
        """Write the parts of an event that TensorBoard shows."""
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
        """Use one run per group, so that the groups' curves share a plot."""
        run, _, work = event.key.partition("/")
        searches = ("round", "base", "scores", "sensitivities")
        stage = "prune" if work.startswith(searches) else "train"
        tags = {f"{stage}/{name}": value for name, value in event.metrics.items()}
        self._add_scalars(run, tags, event.step)
        if event.images is not None:
            self._add_image(run, "samples", image_grid(event.images), event.step)

    def _write_candidate(self, entry: MemoryEntry, step: int) -> None:
        self._entries[entry.key] = entry
        earlier = [
            one
            for one in self._entries.values()
            if one.group == entry.group and one.key <= entry.key
        ]
        name = f"group-{entry.group:02d}"
        losses = {f"{name}/loss": entry.loss, f"{name}/best_loss": best(earlier).loss}
        self._add_scalars("memory", losses, step)
        transcript = transcript_path(self._run_dir.transcripts, entry.group, entry.round)
        if entry.candidate == 0 and exists(transcript):
            step = 1 + entry.round
            self._writer("proxy", step).add_text(name, transcript_text(transcript), step)

    def _add_scalars(self, run: str, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer(run, step).add_scalar(tag, value, step)

    def _add_picture(self, run: str, name: str, path: Path) -> None:
        with Image.open(fetch(path)) as image:
            self._add_image(run, name, np.asarray(image.convert("RGB")))

    def _add_image(self, run: str, name: str, image: NDArray[np.uint8], step: int = 0) -> None:
        """Write an image, ``(H, W, C)``."""
        self._writer(run, step).add_image(name, image, step, dataformats="HWC")

    def _writer(self, run: str, step: int) -> "SummaryWriter":
        if run not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # imports torch

            self._writers[run] = SummaryWriter(
                str(self._dir / run), purge_step=step, flush_secs=SECONDS_BETWEEN_FLUSHES
            )
        return self._writers[run]

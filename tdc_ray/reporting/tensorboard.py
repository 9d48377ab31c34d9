"""What a run shows in TensorBoard beside what its work reports.

Its runs, in the run directory's ``tensorboard``: ``plan`` has the plan's plot, ``memory`` the
losses that the search finds (tags by group, a step for every candidate), ``proxy`` what a language
model was asked and what it said (a step for every round), ``samples`` the first of the images that
base and experts were scored on, ``workers`` who ran what and how well they were used.
"""

import numpy as np

from tdc_ray.execution.timeline import WorkerUsage, load_history, usage
from tdc_ray.pruning.llm.transcripts import transcript_path, transcript_text
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry, best
from tdc_ray.reporting.progress import ProgressView
from tdc_ray.reporting.workers import plot_timeline
from tdc_ray.storage.files import exists, fetch, listing
from tdc_ray.storage.run_dir import RunDir

NUM_SAMPLES = 16
"""Images of each model that are shown."""

WORKERS = "workers"
"""TensorBoard run of how well the workers were used."""


def show_plan(run_dir: RunDir, view: ProgressView) -> None:
    """Show the groups and their limits."""
    view.show_picture("plan", "plan", fetch(run_dir.plan_plot))


def shown_memory(run_dir: RunDir, view: ProgressView, num_candidates: int) -> MemoryBank:
    """Open the memory bank of a run, which shows what it holds and what it will hold.

    Args:
        run_dir: The run.
        view: Where it is shown.
        num_candidates: Of a round.
    """

    def show(entry: MemoryEntry) -> None:
        name, round_ = f"group-{entry.group:02d}", entry.round
        so_far = [
            one for one in memory.all() if one.group == entry.group and one.place <= entry.place
        ]
        losses = {f"{name}/loss": entry.loss, f"{name}/best_loss": best(so_far).loss}
        step = 1 + round_ * num_candidates + entry.candidate
        view.show_scalars("memory", losses, step)
        transcript = transcript_path(run_dir.transcripts, entry.group, round_)
        if entry.candidate == 0 and exists(transcript):
            view.show_text("proxy", name, transcript_text(transcript), 1 + round_)

    memory = MemoryBank(run_dir.memory, show)
    for entry in sorted(memory.all(), key=lambda one: (one.round, one.candidate)):
        show(entry)
    return memory


def show_samples(run_dir: RunDir, view: ProgressView) -> None:
    """Show what base and experts make of the same noise."""
    for which in ("base", "tdc"):
        for path in listing(run_dir.samples / which, "0000000.npz"):
            with np.load(fetch(path)) as file:
                view.show_images("samples", which, file["arr_0"][:NUM_SAMPLES])


def show_usage(run_dir: RunDir, view: ProgressView) -> list[WorkerUsage]:
    """Draw who ran what when, and give how well the workers were used."""
    history = load_history(run_dir.timeline)
    used = usage(history)
    plot_timeline(history, run_dir.timeline_plot)
    view.show_picture(WORKERS, "timeline", fetch(run_dir.timeline_plot))
    for part in used:
        found = {"utilisation": part.utilisation, "makespan_seconds": part.makespan_seconds}
        view.show_scalars(WORKERS, {f"{part.phase}/{name}": one for name, one in found.items()}, 0)
    return used

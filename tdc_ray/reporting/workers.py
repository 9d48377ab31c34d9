"""What the workers did, and would do, as tables and pictures for a person."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tdc_ray.execution.simulator import SimulationResult
from tdc_ray.execution.timeline import History, Span
from tdc_ray.reporting.console import loss_text, print_results
from tdc_ray.runs.status import RunStatus
from tdc_ray.storage.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # imported where it is needed: it takes a second

COLOURS = {
    "measuring": "tab:blue",
    "fine-tuning": "tab:green",
    "evaluating": "tab:purple",
    "lost or failed": "tab:red",
}
"""Of the timeline's plot."""


def plot_timeline(history: History, path: Path) -> None:
    """Draw who ran what, when, if anything ran."""
    if any(span.workers for span in history.spans):
        with atomic_path(path) as temporary:
            timeline_figure(history).savefig(temporary, format="png", dpi=110)


def timeline_figure(history: History) -> "Figure":
    """Draw who ran what, when: a row per worker, a colour per outcome; something must have run."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    spans = [span for span in history.spans if span.workers]
    now = max(span.ended or span.started for span in spans)
    first = spans[0].started
    rows: dict[tuple[float, str], int] = {}  # names begin anew with every driver
    stays = sorted(history.stays, key=lambda stay: stay.joined)
    for stay in stays:
        rows[stay.joined, stay.worker] = len(rows)
    figure = Figure(figsize=(10, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for stay in stays:
        row, end = rows[stay.joined, stay.worker], stay.left or now
        axes.broken_barh([(stay.joined - first, end - stay.joined)], (row - 0.4, 0.8), color="0.9")
    for span in spans:
        colour = COLOURS[_kind(span)]
        for worker in span.workers:
            row = max(
                (
                    place
                    for (joined, name), place in rows.items()
                    if name == worker and joined <= span.started
                ),
                default=0,
            )
            start, end = span.started - first, (span.ended or now) - first
            axes.broken_barh(
                [(start, end - start)], (row - 0.35, 0.7), color=colour, ec="white", lw=0.3
            )
    axes.set_yticks(range(len(rows)), [worker for _, worker in rows])
    axes.set(xlabel="seconds", title="who ran what, when")
    axes.invert_yaxis()
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(
        handles=[*handles, Patch(color="0.9", label="waiting")],
        ncols=6,
        fontsize=8,
        loc="outside lower center",
    )
    return figure


def print_status(console: Console, status: RunStatus) -> None:
    """Print how far a run is."""
    config = status.config
    console.print(f"{config.preset}, seed {config.seed}; stage 1: {status.base}", soft_wrap=True)
    console.print(f"driver: {status.driver or 'none'}", soft_wrap=True)
    table = Table()
    for name in ("group", "timesteps", "candidates", "best loss", "fine-tuned", ""):
        table.add_column(name, justify="left" if not name else "right")
    for group in status.groups:
        table.add_row(
            str(group.index),
            f"{group.timesteps[0]}-{group.timesteps[1]}",
            str(group.num_candidates),
            loss_text(group.best_loss),
            loss_text(group.loss_finetuned),
            "" if group.failed is None else f"failed: {group.failed}",
        )
    console.print(table)
    for name, reason in status.failed.items():
        console.print(f"failed: {name}: {reason}", soft_wrap=True, markup=False)
    for span in status.running:
        seconds = time.time() - span.started
        where = ", ".join(span.workers) or "language model"
        console.print(f"under way: {span.item} on {where}, for {seconds:.0f} s", soft_wrap=True)
    for part in status.usage:
        console.print(
            f"{part.phase}: {part.num_workers} workers, {part.utilisation:.0%} used, "
            f"{part.makespan_seconds:.0f} s (at least {part.lower_bound_seconds:.0f} s), "
            f"{part.lost_seconds:.0f} s lost",
            soft_wrap=True,
        )
    if status.results is None:
        console.print("not finished; the command that began it goes on", soft_wrap=True)
    else:
        print_results(console, status.results)


def _kind(span: Span) -> str:
    """Say what a worker did in a span, in the words of the plot's legend."""
    if span.outcome not in {"done", "running"}:
        return "lost or failed"
    if "finetune" in span.item or "try-" in span.item:
        return "fine-tuning"
    return "evaluating" if span.phase == "evaluation" else "measuring"


def print_simulated(
    console: Console, found: Sequence[SimulationResult], macs_per_second: float
) -> None:
    """Print what a cluster of each size would take, and how fast its workers are taken to be."""
    table = Table(title="stage 2 in simulated time", title_justify="left")
    for name in ("workers", "hours", "at least", "used", "lost", "failures", "given up"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            str(one.num_workers),
            f"{one.makespan_seconds / 3600:.3g}",
            f"{one.lower_bound_seconds / 3600:.3g}",
            f"{one.utilisation:.0%}",
            f"{one.lost_seconds / 3600:.3g} h",
            str(one.num_failures),
            str(len(one.unfinished)),
        )
    console.print(table)
    console.print(
        "used: share of the workers' time; lost: work done twice; items without a measured time: "
        f"at {macs_per_second:.3g} macs per second (--macs-per-second)",
        soft_wrap=True,
    )

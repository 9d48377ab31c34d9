"""What the workers did, and would do, as tables and pictures for a person."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tdc_ray.execution.simulator import SimulationResult
from tdc_ray.reporting.console import print_results
from tdc_ray.reporting.text import loss_text
from tdc_ray.runs.status import RunStatus

if TYPE_CHECKING:
    pass  # imported where it is needed: it takes a second


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

"""Progress and simulations of runs, and their workers, as tables in a terminal."""

import time
from collections.abc import Sequence

from rich.console import Console

from tdc_ray.execution.simulator import SimulationResult
from tdc_ray.execution.timeline import Span
from tdc_ray.reporting.console import print_results, table_of
from tdc_ray.reporting.text import loss_text, timesteps_text
from tdc_ray.runs.status import RunStatus, StartStatus


def print_status(console: Console, status: RunStatus) -> None:
    """Print the progress of a run."""
    config = status.config
    console.print(f"{config.preset}, seed {config.seed}; stage 1: {status.base}", soft_wrap=True)
    console.print(f"driver: {status.driver or 'none'}", soft_wrap=True)
    table = table_of(
        status.groups,
        [
            ("group", lambda group: str(group.index)),
            ("timesteps", lambda group: timesteps_text(group.timesteps)),
            ("candidates", lambda group: str(group.num_candidates)),
            ("best loss", lambda group: loss_text(group.best_loss)),
            ("fine-tuned", lambda group: loss_text(group.loss_finetuned)),
            ("", lambda group: "" if group.failed is None else f"failed: {group.failed}"),
        ],
        left=("",),
    )
    console.print(table)
    for name, reason in status.failed.items():
        console.print(f"failed: {name}: {reason}", soft_wrap=True, markup=False)
    _print_running(console, status.running)
    for part in status.usage:
        console.print(
            f"{part.phase}: {part.num_workers} workers, {part.utilisation:.0%} used, "
            f"{part.makespan_seconds:.0f} s (at least {part.lower_bound_seconds:.0f} s), "
            f"{part.lost_seconds:.0f} s lost",
            soft_wrap=True,
        )
    if status.results is None:
        console.print("not finished; the command that began it resumes it", soft_wrap=True)
    else:
        print_results(console, status.results)


def print_start(console: Console, start: StartStatus) -> None:
    """Print how far the start of a run is."""
    console.print(
        "starting: settings are written once workers are there and, with --hours, steps are timed",
        soft_wrap=True,
    )
    driver = start.driver or "none; the command that began the run begins it again"
    console.print(f"driver: {driver}", soft_wrap=True)
    _print_running(console, start.running)


def _print_running(console: Console, spans: Sequence[Span]) -> None:
    for span in spans:
        seconds = time.time() - span.started
        where = ", ".join(span.workers) or "language model"
        console.print(f"under way: {span.item} on {where}, for {seconds:.0f} s", soft_wrap=True)


def print_simulated(
    console: Console,
    results: Sequence[SimulationResult],
    macs_per_second: float,
    notes: Sequence[str],
) -> None:
    """Print the time on a cluster of each size, the assumed speed of its workers, and notes."""
    table = table_of(
        results,
        [
            ("workers", lambda result: str(result.num_workers)),
            ("hours", lambda result: f"{result.makespan_seconds / 3600:.3g}"),
            ("at least", lambda result: f"{result.lower_bound_seconds / 3600:.3g}"),
            ("used", lambda result: f"{result.utilisation:.0%}"),
            ("lost", lambda result: f"{result.lost_seconds / 3600:.3g} h"),
            ("failures", lambda result: str(result.num_failures)),
            ("given up", lambda result: str(len(result.unfinished))),
        ],
        title="stage 2 in simulated time",
    )
    console.print(table)
    console.print(
        "used: share of the workers' time; lost: work done twice; items without a measured time: "
        f"at {macs_per_second:.3g} macs per second (--macs-per-second)",
        soft_wrap=True,
    )
    for note in notes:
        console.print(note, soft_wrap=True)

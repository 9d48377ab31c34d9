"""The default sinks of a run, which the command line attaches to it."""

import json
from collections.abc import Sequence
from functools import partial

import numpy as np
from rich.console import Console

from tdc_ray.execution.events import EventSink
from tdc_ray.reporting.loggers.clients import CLIENTS
from tdc_ray.reporting.loggers.names import LoggerName
from tdc_ray.reporting.loggers.sink import LoggerSink
from tdc_ray.reporting.progress import ProgressBars
from tdc_ray.reporting.tensorboard import TensorBoard
from tdc_ray.reporting.trace import chrome_trace
from tdc_ray.runs.events import ImagesSampled, PlanMade, WorkersUsed
from tdc_ray.storage.files import exists, fetch, write_text
from tdc_ray.storage.run_dir import RunDir

NUM_SAMPLES = 64
"""Images of each model in its picture."""


def draw_plots(run_dir: RunDir, event: object) -> None:
    """Draw ``plan.png`` and ``timeline.png`` when events with their content arrive."""
    if not isinstance(event, PlanMade | WorkersUsed):
        return
    from tdc_ray.reporting.figures import plot_plan, plot_timeline  # imports Matplotlib

    match event:
        case PlanMade(plan) if not exists(run_dir.plan_plot):
            plot_plan(plan, run_dir.plan_plot)
        case WorkersUsed(history):
            plot_timeline(history, run_dir.timeline_plot)


def draw_samples(run_dir: RunDir, event: object) -> None:
    """Draw ``samples-<model>.png``, the first images of a model, when they were scored."""
    if not isinstance(event, ImagesSampled):
        return
    from tdc_ray.reporting.grid import save_grid

    with np.load(fetch(event.path), allow_pickle=False) as file:
        save_grid(file["arr_0"][:NUM_SAMPLES], run_dir.grid(event.model))


def write_trace(run_dir: RunDir, event: object) -> None:
    """Write ``trace.json``, when all work is done."""
    if isinstance(event, WorkersUsed):
        write_text(run_dir.trace, json.dumps(chrome_trace(event.history)))


def default_sinks(
    run_dir: RunDir, console: Console, log_to: Sequence[LoggerName] = ()
) -> Sequence[EventSink]:
    """Return bars or log lines, pictures, a trace, and TensorBoard, which shows the plots.

    Args:
        run_dir: The run directory.
        console: Where progress is shown.
        log_to: Trackers beside TensorBoard.
    """
    return (
        ProgressBars(console),
        partial(draw_plots, run_dir),
        partial(draw_samples, run_dir),
        partial(write_trace, run_dir),
        TensorBoard(run_dir),
        *(LoggerSink(run_dir, name) for name in dict.fromkeys(log_to) if name in CLIENTS),
    )


def trial_sinks(run_dir: RunDir, log_to: Sequence[LoggerName] = ()) -> Sequence[EventSink]:
    """Return the sinks of a run that has no terminal."""
    return default_sinks(run_dir, Console(quiet=True), log_to)

"""Plans, results, memory banks and sweeps as tables in a terminal."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.prune import Objective
from tdc_ray.data.summary import summary_lines
from tdc_ray.diffusion.plan import Plan
from tdc_ray.models.training_memory import TrainingMemory
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.reporting.models import LONGER_BASE, ModelRow, model_rows
from tdc_ray.reporting.paper import PAPER
from tdc_ray.reporting.text import (
    bytes_text,
    conclusions,
    interval_text,
    limit_text,
    loss_text,
    macs_text,
    millions_text,
    percent_text,
    timesteps_text,
)
from tdc_ray.runs.results import (
    ComparisonResult,
    GroupResult,
    LossDifference,
    Results,
    score_text,
)
from tdc_ray.runs.sweep.results import SettingSummary, SweepResults
from tdc_ray.storage.object_store import display_path

T = TypeVar("T")
TextColumn = tuple[str, Callable[[T], str]]
"""A column's name, and what it shows of an item."""


def table_of(
    items: Iterable[T],
    columns: Sequence[TextColumn[T]],
    *,
    title: str | None = None,
    left: Collection[str] = (),
) -> Table:
    """Return a table with a row for each item; only the columns in ``left`` wrap."""
    table = Table(title=title, title_justify="left")
    for name, _ in columns:
        if name in left:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for item in items:
        table.add_row(*(text(item) for _, text in columns))
    return table


def print_plan(
    console: Console,
    plan: Plan,
    preset: str,
    settings: PlanConfig,
    objective: Objective,
    macs_base: int,
) -> None:
    """Print the groups, and the mean limit beside the paper's figure where there is one."""
    title = (
        f"{preset}: {settings.schedule} schedule, k = {settings.min_macs_share:g}, "
        f"N = {settings.num_groups}, base {macs_text(macs_base)} macs"
    )
    table = table_of(
        plan.groups,
        [
            ("group", lambda group: str(group.index)),
            ("timesteps", lambda group: timesteps_text((group.first, group.last))),
            ("size", lambda group: str(len(group.timesteps))),
            ("SNR (dB)", lambda group: f"{group.snr_db_first:.1f} to {group.snr_db_last:.1f}"),
            ("limit / F", lambda group: f"{group.limit_share:.4f}"),
            ("limit (macs)", lambda group: macs_text(group.limit(macs_base))),
            ("steps", lambda group: str(group.num_sampling_steps)),
        ],
        title=title,
    )
    console.print(table)
    if objective == "latency":
        console.print("limits are shares of the base's time, which the run measures, not of macs")
    steps = len(plan.sampling_timesteps)
    console.print(
        f"mean limit over the {steps} sampling steps: {plan.mean_limit_share:.5g} F = "
        f"{macs_text(plan.mean_limit_share * macs_base)} macs",
        soft_wrap=True,
    )
    paper = PAPER.get(preset)
    if paper is not None:
        console.print(
            f"the paper's mean of the experts, for k = 0.5 and N = 10: {macs_text(paper.macs)}",
            soft_wrap=True,
        )
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def print_training_memory(console: Console, memory: TrainingMemory, num_workers: int) -> None:
    """Print what the base's training takes of each worker's memory."""
    workers = "one worker" if num_workers == 1 else f"each of {num_workers} workers"
    exchanged = f", about {bytes_text(memory.exchanged)} while they exchange"
    console.print(
        f"training the base, {workers} holds {bytes_text(memory.kept)} (weights "
        f"{bytes_text(memory.weights)}, gradients {bytes_text(memory.gradients)}, moments "
        f"{bytes_text(memory.moments)}, averages {bytes_text(memory.averages)})"
        f"{exchanged if memory.exchanged else ''}, and activations",
        soft_wrap=True,
    )


def print_results(console: Console, results: Results) -> None:
    """Print a run's results, and what they do and do not show."""
    rows = model_rows(results)
    models = table_of(
        rows,
        [
            ("model", lambda row: row.label),
            (results.metric, lambda row: score_text(row.score)),
            ("FLOPs (MACs)", lambda row: macs_text(row.macs)),
            ("params", lambda row: millions_text(row.num_params)),
            ("img/s", lambda row: _rate(row.images_per_second)),
        ],
        title=f"{results.preset}, seed {results.seed}",
        left=("model",),
    )
    console.print(models)
    if results.tdc.metrics:
        console.print(_metrics_table(rows, list(results.tdc.metrics)))
    console.print(_costs_table(rows))
    steps: list[TextColumn[GroupResult]] = []
    if len({group.train_steps for group in results.groups}) > 1:
        steps = [("steps", lambda g: "-" if g.train_steps is None else f"{g.train_steps:,}")]
    groups = table_of(
        results.groups,
        [
            ("group", lambda group: str(group.index)),
            ("timesteps", lambda group: timesteps_text(group.timesteps)),
            ("limit", limit_text),
            ("macs", lambda group: macs_text(group.macs)),
            *steps,
            ("base", lambda group: f"{group.loss_base:.4f}"),
            ("cut", lambda group: f"{group.loss_cut:.4f}"),
            ("refit", lambda g: "-" if g.loss_refit is None else f"{g.loss_refit:.4f}"),
            ("tuned", lambda group: f"{group.loss_finetuned:.4f}"),
        ],
        title="groups (losses on held-out noise)",
    )
    console.print(groups)
    if results.comparison is not None:
        console.print(_comparison_table(results, results.comparison))
    for line in conclusions(results):
        console.print(line, soft_wrap=True)
    if results.images is not None:
        for line in summary_lines(results.dataset, results.images):
            console.print(line, soft_wrap=True)


def _rate(images_per_second: float | None) -> str:
    return "-" if images_per_second is None else f"{images_per_second:.1f}"


def _metrics_table(rows: Sequence[ModelRow], names: Sequence[str]) -> Table:
    """Return the scores beside the metric."""

    def value_of(name: str) -> Callable[[ModelRow], str]:
        return lambda row: f"{row.metrics[name]:.4g}" if name in row.metrics else "-"

    columns = [(name, value_of(name)) for name in names]
    return table_of(
        rows,
        [("model", lambda row: row.label), *columns],
        title="other scores: distances lower, precision and recall higher is better",
        left=("model",),
    )


def _costs_table(rows: Sequence[ModelRow]) -> Table:
    """Return what training and search of each model took, and both over the base's training."""
    of_base = rows[0].train_macs

    def times(macs: float) -> str:
        return f"{macs / of_base:.2f}" if of_base else "-"

    return table_of(
        rows,
        [
            ("model", lambda row: row.label),
            ("steps", lambda row: f"{row.train_steps:,}"),
            ("train macs", lambda row: f"{row.train_macs:.2e}"),
            ("/ base", lambda row: times(row.train_macs)),
            ("search macs", lambda row: f"{row.search_macs:.2e}" if row.search_macs else "0"),
            ("both / base", lambda row: times(row.macs_spent)),
        ],
        title="what they took",
        left=("model",),
    )


def _comparison_table(results: Results, comparison: ComparisonResult) -> Table:
    """Return the losses of TDC beside those of the base trained on, group by group."""
    rows: list[tuple[str, LossDifference]] = [
        (str(group.index), group) for group in comparison.groups
    ]
    rows.append(("all", comparison.mean))
    swaps = {str(swap.index): score_text(swap.score) for swap in comparison.swaps}
    columns: list[TextColumn[tuple[str, LossDifference]]] = [
        ("group", lambda row: row[0]),
        ("TDC", lambda row: f"{row[1].loss_tdc:#.4g}"),
        ("base", lambda row: f"{row[1].loss_base:#.4g}"),
        ("difference", lambda row: percent_text(row[1], row[1].difference)),
        ("95 % interval", lambda row: interval_text(row[1])),
    ]
    if swaps:
        columns.append(("put in", lambda row: swaps.get(row[0], "")))
    title = f"losses of TDC and of the {LONGER_BASE}, on images no choice has seen"
    if swaps:
        title += f"; {results.metric} of that base with the group's expert put in"
    return table_of(rows, columns, title=title)


def print_pruned(console: Console, report: Mapping[str, Any]) -> None:
    """Print the results of ``tdc-ray prune``."""
    base, losses = report["loss_base"], {name: report[f"loss_{name}"] for name in ("cut", "refit")}
    whole, pruned = (
        (macs_text(report[f"macs{model}"]), millions_text(report[f"num_params{model}"]))
        for model in ("_base", "")
    )
    table = Table(title=f"pruned by {report['source']}", title_justify="left")
    for name in ("model", "macs", "params", "loss", "loss above the base's"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("base", *whole, f"{base:.5f}", "")
    for name, loss in losses.items():
        if loss is not None:
            table.add_row(name, *pruned, f"{loss:.5f}", f"{loss - base:+.5f}")
    console.print(table)
    first, last = report["timesteps"]
    limit, time = f"{macs_text(report['macs_limit'])} macs", report.get("time")
    if time is not None:
        limit = f"{time['limit_ms']:.4g} ms"
        console.print(
            f"a forward pass of {time['batch_size']} images takes {time['ms']:.4g} ms, the base's "
            f"{time['base_ms']:.4g} ms ({time['ms'] / time['base_ms']:.3f}); by the table of its "
            f"units {time['table_ms']:.4g} of {time['base_table_ms']:.4g} ms; {time['device']}",
            soft_wrap=True,
        )
    console.print(
        f"timesteps {first} to {last}, limit {limit}, losses on held-out images and noise, "
        f"{report['seconds']:.0f} s",
        soft_wrap=True,
    )
    for note in report["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def print_memory(console: Console, entries: Sequence[MemoryEntry], path: Path) -> None:
    """Print a memory bank group by group, the best scheme last."""
    console.print(display_path(path), soft_wrap=True)

    def overshoot(entry: MemoryEntry) -> str:
        is_time = entry.nanoseconds is not None
        return f"{entry.overshoot / 1e6:.4g} ms" if is_time else macs_text(entry.overshoot)

    def distance(entry: MemoryEntry) -> str:
        value = (entry.final or entry).distance
        return "-" if value is None else f"{value:.2e}"

    columns: list[TextColumn[MemoryEntry]] = [
        ("group", lambda entry: str(entry.group)),
        ("round", lambda entry: f"{entry.round}.{entry.candidate}"),
        ("source", lambda entry: entry.source),
        ("macs", lambda entry: macs_text(entry.macs)),
        ("cut", lambda entry: loss_text((entry.final or entry).loss_cut)),
    ]
    if any(entry.nanoseconds is not None for entry in entries):
        columns.append(("ms", lambda e: f"{e.nanoseconds / 1e6:.4g}" if e.nanoseconds else "-"))
    if any(entry.loss_refit is not None for entry in entries):
        columns.append(("refit", lambda entry: loss_text((entry.final or entry).loss_refit)))
    if any(entry.loss_tuned is not None for entry in entries):
        columns.append(("tuned", lambda entry: loss_text(entry.loss_tuned)))
    if any(entry.distance is not None for entry in entries):
        columns.append(("distance", distance))
    if any(entry.overshoot for entry in entries):
        columns.append(("overshoot", overshoot))
    columns.append(("widths", lambda entry: " ".join(map(str, entry.widths.values()))))

    def order(entry: MemoryEntry) -> tuple[int, bool, bool, float]:
        rank = (entry.final or entry).rank
        return entry.group, entry.final is not None, not math.isnan(rank), -rank

    rows = sorted(entries, key=order)
    table = table_of(rows, columns, left=("widths",))
    for row, (entry, following) in zip(table.rows, pairwise(rows), strict=False):
        row.end_section = entry.group != following.group
    console.print(table)
    if entries:
        console.print(f"widths: of {', '.join(entries[0].widths)}", soft_wrap=True)


def print_sweep(console: Console, results: SweepResults) -> None:
    """Print a line for every setting, the Pareto front marked, and how much was computed."""

    def score(setting: SettingSummary) -> str:
        spread = setting.spread.get("score")
        mean = score_text(setting.mean["score"])
        return mean + ("" if spread is None else f" ± {score_text(spread)}")

    def of_done(text: Callable[[SettingSummary], str]) -> Callable[[SettingSummary], str]:
        return lambda setting: text(setting) if setting.mean else "-"

    def param(name: str) -> Callable[[SettingSummary], str]:
        return lambda setting: str(setting.params[name])

    table = table_of(
        results.settings,
        [
            *((label, param(name)) for name, label in results.labels.items()),
            ("runs", lambda setting: str(setting.num_done)),
            (results.metric, of_done(score)),
            ("FLOPs (MACs)", of_done(lambda s: f"{s.mean['macs'] / 1e6:.2f} M")),
            ("params", of_done(lambda s: millions_text(s.mean["num_params"]))),
            ("train macs", of_done(lambda s: f"{s.mean['train_macs']:.3g}")),
            ("search macs", of_done(lambda s: f"{s.mean['search_macs']:.3g}")),
            ("", lambda setting: "Pareto" if setting.pareto else ""),
        ],
        title=results.name,
        left=results.labels.values(),
    )
    console.print(table)
    if share := results.computed_share:
        console.print(
            f"of the macs that training and search of these runs take one by one, {share:.0%} "
            f"were computed; the rest was shared. Minimised: {', '.join(results.objectives)}",
            soft_wrap=True,
        )

"""Plans and results as tables and pictures for a person."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import Plan
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.reporting.paper import PAPER
from tdc_ray.reporting.text import conclusions, limit_text, loss_text, macs_text, millions_text
from tdc_ray.runs.results import ModelResult, Results
from tdc_ray.storage.object_store import display_path

if TYPE_CHECKING:
    pass  # imported where it is needed: it takes a second


def print_plan(console: Console, plan: Plan, config: RunConfig, macs_base: int) -> None:
    """Print the groups, and the mean limit beside the paper's figure where there is one."""
    title = (
        f"{config.preset}: {config.plan.schedule} schedule, k = {config.plan.min_macs_share:g}, "
        f"N = {config.plan.num_groups}, base {macs_text(macs_base)} macs"
    )
    table = Table(title=title, title_justify="left")
    for name in ("group", "timesteps", "size", "SNR (dB)", "limit / F", "limit (macs)", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in plan.groups:
        table.add_row(
            str(group.index),
            f"{group.first}-{group.last}",
            str(len(group.timesteps)),
            f"{group.snr_db_first:.1f} to {group.snr_db_last:.1f}",
            f"{group.limit_share:.4f}",
            macs_text(group.limit(macs_base)),
            str(group.num_sampling_steps),
        )
    console.print(table)
    if config.prune.objective == "latency":
        console.print("limits are shares of the base's time, which the run measures, not of macs")
    steps = len(plan.sampling_timesteps)
    console.print(
        f"mean limit over the {steps} sampling steps: {plan.mean_limit_share:.5g} F = "
        f"{macs_text(plan.mean_limit_share * macs_base)} macs",
        soft_wrap=True,
    )
    paper = PAPER.get(config.preset)
    if paper is not None:
        console.print(
            f"the paper's mean of the experts, for k = 0.5 and N = 10: {macs_text(paper.macs)}",
            soft_wrap=True,
        )
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def print_results(console: Console, results: Results) -> None:
    """Print a run's results, and what they do and do not show."""
    table = Table(title=f"{results.preset}, seed {results.seed}", title_justify="left")
    table.add_column("model", no_wrap=True)
    names = (results.metric, "FLOPs (MACs)", "params", "steps", "train macs", "img/s")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("base", *_model_row(results.base))
    label = "TDC" if results.prune.method != "none" else "TDC, no pruning"
    table.add_row(label, *_model_row(results.tdc))
    console.print(table)
    groups = Table(title="groups (losses on held-out noise)", title_justify="left")
    for name in ("group", "timesteps", "limit", "macs", "base", "cut", "refit", "tuned"):
        groups.add_column(name, justify="right", no_wrap=True)
    for group in results.groups:
        groups.add_row(
            str(group.index),
            f"{group.timesteps[0]}-{group.timesteps[1]}",
            limit_text(group),
            macs_text(group.macs),
            f"{group.loss_base:.4f}",
            f"{group.loss_cut:.4f}",
            "-" if group.loss_refit is None else f"{group.loss_refit:.4f}",
            f"{group.loss_finetuned:.4f}",
        )
    console.print(groups)
    for line in conclusions(results):
        console.print(line, soft_wrap=True)


def print_pruned(console: Console, report: Mapping[str, Any]) -> None:
    """Print what ``tdc-ray prune`` came to."""
    table = Table(title=f"pruned by {report['source']}", title_justify="left")
    for name in ("model", "macs", "params", "loss", "loss above the base's"):
        table.add_column(name, justify="right", no_wrap=True)
    base, left = (
        report["loss_base"],
        (macs_text(report["macs"]), millions_text(report["num_params"])),
    )
    whole = (macs_text(report["macs_base"]), millions_text(report["num_params_base"]))
    table.add_row("base", *whole, f"{base:.5f}", "")
    for name, loss in (("cut", report["loss_cut"]), ("refit", report["loss_refit"])):
        if loss is not None:
            table.add_row(name, *left, f"{loss:.5f}", f"{loss - base:+.5f}")
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
    optional = {
        "ms": any(entry.nanoseconds is not None for entry in entries),
        "refit": any(entry.loss_refit is not None for entry in entries),
        "tuned": any(entry.loss_tuned is not None for entry in entries),
        "overshoot": any(entry.overshoot for entry in entries),
    }
    columns = [name for name, wanted in optional.items() if wanted]
    table = Table()
    for name in ("group", "round", "source", "macs", "cut", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("widths", overflow="fold")
    for group in sorted({entry.group for entry in entries}):
        own = [entry for entry in entries if entry.group == group]
        for entry in sorted(own, key=lambda e: (not math.isnan(e.loss), -e.loss)):
            is_time = entry.nanoseconds is not None
            over = f"{entry.overshoot / 1e6:.4g} ms" if is_time else macs_text(entry.overshoot)
            cells = {
                "ms": f"{(entry.nanoseconds or 0) / 1e6:.4g}" if is_time else "-",
                "refit": loss_text(entry.loss_refit),
                "tuned": loss_text(entry.loss_tuned),
                "overshoot": over,
            }
            table.add_row(
                str(group),
                f"{entry.round}.{entry.candidate}",
                entry.source,
                macs_text(entry.macs),
                loss_text(entry.loss_cut),
                *(cells[name] for name in columns),
                " ".join(str(width) for width in entry.widths.values()),
            )
        table.add_section()
    console.print(table)
    if entries:
        console.print(f"widths: of {', '.join(entries[0].widths)}", soft_wrap=True)


def _model_row(model: ModelResult) -> tuple[str, ...]:
    return (
        f"{model.score:.3f}",
        macs_text(model.macs),
        millions_text(model.num_params),
        f"{model.train_steps:,}",
        f"{model.train_macs:.2e}",
        f"{model.images_per_second:.1f}",
    )

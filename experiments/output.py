"""Output of experiments: tables, plots, and numbers with their provenance."""

import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from common import Flags
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from torchvision.utils import make_grid

from tdc_ray.config.run import to_json
from tdc_ray.runs.collect_results import item_results
from tdc_ray.runs.sweep.results import SweepResults, TrialRow
from tdc_ray.storage.files import atomic_path, fetch, listing, write_json, write_text
from tdc_ray.storage.provenance import commit, machine
from tdc_ray.storage.run_dir import RunDir


def paper_column(numbers: Mapping[str, Mapping[str, str]], preset: str) -> dict[str, str]:
    """Return the paper's numbers on a preset's dataset, or on the most similar one.

    That is FFHQ for latents, where the table has it, and CIFAR-10 otherwise.
    """
    like = "ffhq256-ldm" if preset.endswith("-ldm") and "ffhq256-ldm" in numbers else "cifar10"
    name = preset if preset in numbers else like
    return {"": f"the paper's ({name})", **numbers[name]}


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Write mean and sample standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def write_table(
    folder: Path, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> None:
    """Print a table and write it as CSV and Markdown, with a note, beside its provenance."""
    table = Table(title=name)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table, *[note] * bool(note))
    path = folder / f"{name}.csv"
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    lines = [columns, ["---"] * len(columns), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    write_text(folder / f"{name}.md", text + "\n" + f"\n{note}\n" * bool(note))


def plot_bars(folder: Path, name: str, values: Mapping[str, Sequence[float]], xlabel: str) -> None:
    """Draw the mean of every row as a bar and each of its values as a dot."""
    figure = Figure(figsize=(7, 0.4 * len(values) + 1), layout="constrained")
    axes = figure.subplots()
    for place, some in enumerate(values.values()):
        axes.barh(place, statistics.mean(some), color="tab:blue", alpha=0.5)
        axes.plot(some, [place] * len(some), "k.", markersize=4)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    _save(figure, folder / f"{name}.png")


def write_sweep(
    folder: Path,
    name: str,
    flags: Flags,
    results: SweepResults,
    titles: Mapping[str, str],
    paper: Mapping[str, str],
) -> None:
    """Write table and record of a sweep: a row a setting, after the base's.

    Every row has the cost of its own training; a note says how much of all that was computed, and
    how much was shared.

    Args:
        folder: Where they go.
        name: Their name without the suffix.
        flags: The experiment's flags.
        results: The sweep.
        titles: What to call each setting.
        paper: The paper's column: its title under "", numbers by titles.
    """
    some = [row for row in results.rows if row.setting in titles]
    bases = {row.seed: row.base_score for row in some if row.base_score is not None}
    scores = scores_of_settings(results)
    columns = ["", str(some[0].metric), paper[""], "FLOPs (MACs)", "params", "train macs"]
    columns += ["search macs", "Pareto"]

    def line(title: str, scores: Sequence[float], cost: Mapping[str, float]) -> list[str]:
        return [
            title,
            mean_and_spread(scores),
            paper.get(title, "-"),
            f"{cost['macs'] / 1e6:.2f} M",
            f"{cost['num_params'] / 1e6:.2f} M",
            f"{cost['train_macs']:.3g}",
            f"{cost['search_macs']:.2g}",
        ]

    of_base = {
        name: float(getattr(some[0], f"base_{name}"))
        for name in ("macs", "num_params", "train_macs")
    }
    table = [[*line("base", list(bases.values()), of_base | {"search_macs": 0.0}), ""]]
    settings = {setting.name: setting for setting in results.settings}
    for name_of_setting, title in titles.items():
        setting = settings[name_of_setting]
        front = "yes" if setting.pareto else ""
        table.append([*line(title, scores[setting.name], setting.mean), front])
    note = (
        f"Train and search macs are what a row takes by itself, the base included; of all rows' "
        f"macs {results.computed_share or 0.0:.0%} were computed, the rest was shared. Pareto: no "
        f"other row is as good in {' and '.join(results.objectives)}."
    )
    write_table(folder, name, columns, table, note)
    record = {"metric": some[0].metric, "computed_share": results.computed_share}
    record |= unique_work(folder, some)
    listed, commits = [asdict(row) for row in some], {row.commit for row in some}
    write_record(folder, name, flags, commits, {**record, "rows": listed})


def unique_work(folder: Path, rows: Sequence[TrialRow]) -> dict[str, float]:
    """Count the keys of a store that runs computed, those computed twice, and their train macs."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for result in item_results(RunDir(folder / row.run_dir)):
            if (mark := result.cached) and not mark.reused:
                macs = float(result.value.get("train_macs", 0.0))
                found.setdefault(mark.key, []).append(macs)
    return {
        "keys_computed": len(found),
        "keys_computed_twice": sum(len(some) > 1 for some in found.values()),
        "train_macs_of_keys": sum(some[0] for some in found.values()),
        "train_macs_computed": sum(row.computed_train_macs or 0.0 for row in rows),
    }


def scores_of_settings(results: SweepResults) -> dict[str, list[float]]:
    """Return the scores of each setting's runs."""
    found: dict[str, list[float]] = {}
    for row in results.rows:
        if row.score is not None:
            found.setdefault(row.setting, []).append(row.score)
    return found


def plot_sweep(folder: Path, name: str, field: str, results: SweepResults, label: str) -> None:
    """Draw scores and macs over a number that was varied: the mean, and a dot for every seed."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    done = sorted(
        (setting for setting in results.settings if setting.num_done),
        key=lambda setting: float(setting.params[field] or 0),
    )
    values = [float(setting.params[field] or 0) for setting in done]
    left.plot(values, [setting.mean["score"] for setting in done], "o-", color="tab:blue")
    for row in results.rows:
        if row.score is not None:
            left.plot(float(row.params[field] or 0), row.score, ".", color="tab:blue", alpha=0.4)
    right.plot(values, [setting.mean["macs"] / 1e6 for setting in done], "s--", color="tab:orange")
    left.set_xlabel(label)
    left.set_ylabel(results.metric, color="tab:blue")
    right.set_ylabel("FLOPs (MACs), M", color="tab:orange")
    _save(figure, folder / f"{name}.png")


def plot_lines(
    folder: Path,
    name: str,
    lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Draw mean and sample standard deviation of several values at every point of each line."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        middle = [statistics.mean(values) for _, values in points]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        axes.errorbar([x for x, _ in points], middle, spread, marker="o", capsize=3, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    _save(figure, folder / f"{name}.png")


def plot_growth(
    folder: Path, name: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> None:
    """Draw how each of several costs grows, from 1 at its first point on, on logarithmic axes."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    far = 1.0
    for label, (xs, ys) in lines.items():
        axes.plot([x / xs[0] for x in xs], [y / ys[0] for y in ys], marker="o", label=label)
        far = max(far, xs[-1] / xs[0])
    axes.plot([1, far], [1, far], "k--", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="times the first point's", ylabel="times its cost")
    figure.legend(fontsize=7, loc="outside right upper")
    _save(figure, folder / f"{name}.png")


def write_samples(folder: Path, name: str, runs: Mapping[str, Path], num_images: int) -> None:
    """Draw images of several models side by side, image by image from the same noise.

    Args:
        folder: Where the PNG goes.
        name: Its name without the suffix.
        runs: For every title, the folder of samples of a run's evaluation.
        num_images: How many of each.
    """
    figure = Figure(figsize=(1.8 * len(runs) + 0.4, 2.2), layout="constrained")
    for axes, (title, samples) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        images = torch.from_numpy(np.load(fetch(listing(samples, "*[0-9].npz")[0]))["arr_0"])
        grid = make_grid(images[:num_images].permute(0, 3, 1, 2), nrow=round(num_images**0.5))
        axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    _save(figure, folder / f"{name}.png")


def provenance() -> dict[str, object]:
    """Return the provenance of this process's numbers: command, machine and commit."""
    return _made_here() | {"commit": commit()}


def _made_here() -> dict[str, object]:
    return {"command": " ".join(["python", *sys.argv]), "machine": machine()}


def write_record(
    folder: Path, name: str, flags: Flags, commits: set[str | None], record: Mapping[str, object]
) -> None:
    """Write the numbers behind a table as JSON, beside command, commits, seeds and machine.

    Args:
        folder: Where the JSON goes.
        name: Its name without the suffix.
        flags: The experiment's flags.
        commits: Commits that the results were made with.
        record: The numbers.
    """
    made_by = _made_here() | {
        "commits": sorted(str(commit) for commit in commits),
        "seeds": list(flags.seeds),
        "settings": to_json(flags.config(flags.seeds[0])),
    }
    write_json(folder / f"{name}.json", {"made_by": made_by, **record})


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

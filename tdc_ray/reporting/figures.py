"""Every plot: as a PNG file beside a run, or as SVG in the colours and the font of the page.

Matplotlib draws in its own colours; in SVG each becomes a variable of the page's style, so that
one picture is right on dark and on light.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from tdc_ray.diffusion.plan import Plan
from tdc_ray.execution.timeline import History, Span, worker_rows
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.reporting.text import macs_text
from tdc_ray.runs.results import ComparisonResult, Results, StageSeconds, TimesResult
from tdc_ray.storage.files import atomic_path

SIZE = (4.6, 3.1)
"""Size of a plot in inches: at a phone's width its letters are as large as the page's small
ones."""

BASE = "tab:gray"
CYCLE = [f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # C7 is the base's

MAX_LABEL = 18
"""Most letters of a label in a plot; of longer ones the end is shown."""

COLOURS = {
    "measuring": "tab:blue",
    "fine-tuning": "tab:green",
    "evaluating": "tab:purple",
    "lost or failed": "tab:red",
}
"""Size of the timeline's plot."""

_VARIABLES = {to_hex(colour): f"--c{n}" for n, colour in enumerate(TABLEAU_COLORS.values())} | {
    "#000000": "--ink",
    "#ffffff": "--surface",
    "#808080": "--muted",
    "#e5e5e5": "--line",
    "#b0b0b0": "--line",
    "#e6e6e6": "--line",
}
"""Matplotlib's colours and the page's."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files
    "font.size": 10,
    "axes.edgecolor": "#b0b0b0",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.8,
    "xtick.color": "#b0b0b0",
    "ytick.color": "#b0b0b0",
    "xtick.labelcolor": "#808080",
    "ytick.labelcolor": "#808080",
    "axes.labelcolor": "#808080",
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def plot_plan(plan: Plan, path: Path) -> None:
    """Write the plot of a plan as a PNG file."""
    _write_png(plan_figure(plan, (8, 4)), path)


def plot_timeline(history: History, path: Path) -> None:
    """Write the plot of the timeline as a PNG file, if anything ran."""
    if any(span.workers for span in history.spans):
        _write_png(timeline_figure(history), path)


def _write_png(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def plan_figure(plan: Plan, size: tuple[float, float]) -> Figure:
    """Draw SNR and limit over the timesteps, in a size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    limits = figure.subplots()
    for group in plan.groups:
        span = (group.first, group.last + 1)
        limits.fill_between(span, group.limit_share, alpha=0.35, step="post", color="tab:blue")
        limits.plot(span, (group.limit_share, group.limit_share), color="tab:blue")
    limits.set(xlabel="timestep (0 is the least noisy)", ylabel="limit / F", ylim=(0, 1.05))
    snr = limits.twinx()
    ends = [((g.first, g.last), (g.snr_db_first, g.snr_db_last)) for g in plan.groups]
    snr.plot(*np.hstack(ends), color="tab:orange")
    snr.set_ylabel("SNR (dB)", color="tab:orange")
    return figure


def timeline_figure(history: History) -> Figure:
    """Draw a timeline: a row per worker, a colour per outcome; something must have run."""
    spans = [span for span in history.spans if span.workers]
    now = max(span.ended or span.started for span in spans)
    first = spans[0].started
    stays, rows = worker_rows(history)
    figure = Figure(figsize=(10, 1.5 + 0.3 * len(stays)), layout="constrained")
    axes = figure.subplots()
    for row, stay in enumerate(stays):
        start, end = stay.joined - first, (stay.left or now) - first
        axes.broken_barh([(start, end - start)], (row - 0.4, 0.8), color="0.9")
    for row, span in rows:
        start, end = span.started - first, (span.ended or now) - first
        colour = COLOURS[_kind(span)]
        bar = (row - 0.35, 0.7)
        axes.broken_barh([(start, end - start)], bar, color=colour, ec="white", lw=0.3)
    axes.set_yticks(range(len(stays)), [stay.worker for stay in stays])
    axes.set(xlabel="seconds", title="who ran what, when")
    axes.invert_yaxis()
    kinds = {**COLOURS, "waiting": "0.9"}
    handles = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
    figure.legend(handles=handles, ncols=6, fontsize=8, loc="outside lower center")
    return figure


def _kind(span: Span) -> str:
    """Return the legend's label of a span."""
    if span.outcome not in {"done", "running"}:
        return "lost or failed"
    if "finetune" in span.item or "try-" in span.item or span.item == "longer-base/train":
        return "fine-tuning"
    return "evaluating" if span.phase == "evaluation" else "measuring"


@dataclass(frozen=True, slots=True)
class Point:
    """A model in a plot of scores."""

    label: str
    score: float
    macs: float
    """Macs of a denoising step."""

    train_macs: float | None
    """Macs of its training, search included; None means that they are not known."""

    is_base: bool
    is_best: bool = False
    """Whether it is on the Pareto front."""


def svg_of(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element.

    Args:
        figure: The figure.
        name: Unique on the page: it is part of the ids.
    """
    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'[^;\"]*", r"\1sans-serif", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


@contextmanager
def drawing(size: tuple[float, float] = SIZE) -> Iterator[tuple[Figure, Axes]]:
    """Yield an empty figure in the page's style."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots()


def plan_over_timesteps(plan: Plan, name: str) -> str:
    """Draw the limits and the SNR over the timesteps."""
    with mpl.rc_context({**_STYLE, "axes.spines.right": True, "axes.grid": False}):
        return svg_of(plan_figure(plan, SIZE), name)


def timeline(history: History, name: str) -> str:
    """Draw a timeline."""
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = timeline_figure(history)
        figure.axes[0].set_title("")  # the page has it
        return svg_of(figure, name)


def score_figure(
    points: Sequence[Point], metric: str, name: str, *, over_training: bool = False
) -> str:
    """Draw scores; a circle's area grows with the macs of a step, as in the paper's Figure 1.

    Args:
        points: The models; a label that would overlap another is left out.
        metric: Name of the scores.
        name: Name of the picture.
        over_training: Whether the x axis has the macs of training, not of a step.
    """
    with drawing() as (figure, axes):
        most = max(point.macs for point in points)
        placed = [((p.train_macs if over_training else p.macs) or 0.0, p) for p in points]
        for x, point in placed:
            colour = BASE if point.is_base else "tab:orange" if point.is_best else "tab:blue"
            area, order = 260 * point.macs / most, 3 if point.is_best else 2
            style: dict[str, Any] = {"color": colour, "ec": colour, "alpha": 0.55, "lw": 1.2}
            axes.scatter(x, point.score, s=area, zorder=order, **style)
        for x, point in _labelled(placed):
            label = point.label
            axes.annotate(
                label if len(label) <= MAX_LABEL else f"…{label[1 - MAX_LABEL :]}",
                (x, point.score),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        front = sorted((x, point.score) for x, point in placed if point.is_best)
        falls = all(a[1] > b[1] for a, b in pairwise(front))  # it is one of other objectives else
        if len(front) > 1 and falls:
            axes.plot(*zip(*front, strict=True), color="tab:orange", lw=1.2, ls="--", zorder=1)
        axes.margins(0.22, 0.25)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        text = "{:.3g}".format if over_training else macs_text
        axes.xaxis.set_major_formatter(FuncFormatter(lambda macs, _: text(macs)))
        below = "macs of training and search" if over_training else "macs of a denoising step"
        axes.set(xlabel=below, ylabel=f"{metric} (lower is better)")
        return svg_of(figure, name)


def _labelled(placed: Sequence[tuple[float, Point]]) -> Sequence[tuple[float, Point]]:
    """Return the points that have room for a label: bases and the best ones first."""
    xs, scores = [x for x, _ in placed], [point.score for _, point in placed]
    width, height = max(xs) - min(xs) or 1.0, max(scores) - min(scores) or 1.0
    chosen: list[tuple[float, Point]] = []
    for x, point in sorted(placed, key=lambda item: (not item[1].is_base, not item[1].is_best)):
        if point.label and all(
            abs(x - other_x) / width > 0.3 or abs(point.score - other.score) / height > 0.12
            for other_x, other in chosen
        ):
            chosen.append((x, point))
    return chosen


def plan_over_snr(plan: Plan, results: Results | None, name: str) -> str:
    """Draw every group's limit, and its expert's macs, over the signal-to-noise ratio."""
    with drawing() as (figure, axes):
        for group in plan.groups:
            span = (group.snr_db_first, group.snr_db_last)
            share = (group.limit_share, group.limit_share)
            first = group.index == 0
            axes.fill_between(span, share, alpha=0.18, color="tab:blue", lw=0)
            axes.plot(span, share, color="tab:blue", label="limit" if first else None)
            if results is not None and group.index < len(results.groups):
                expert, label = results.groups[group.index], "expert" if first else None
                taken = expert.macs / results.base.macs
                if expert.milliseconds is not None and expert.milliseconds_limit:
                    taken = group.limit_share * expert.milliseconds / expert.milliseconds_limit
                axes.plot(sum(span) / 2, taken, "o", color="tab:orange", ms=5, label=label)
        axes.invert_xaxis()
        what = "time" if results and results.prune.objective == "latency" else "macs"
        axes.set(xlabel="SNR in dB (noisier to the right)", ylabel=f"{what} / F", ylim=(0, 1.12))
        axes.legend(loc="lower right")
        return svg_of(figure, name)


def losses_of_groups(results: Results, name: str) -> str:
    """Draw each group's loss after pruning, refit and fine-tune, relative to the base's."""
    stages: dict[str, tuple[str, str, Sequence[float | None]]] = {
        "cut": ("tab:red", "^", [group.loss_cut for group in results.groups]),
        "refit": ("tab:orange", "s", [group.loss_refit for group in results.groups]),
        "fine-tuned": ("tab:blue", "o", [group.loss_finetuned for group in results.groups]),
    }
    with drawing() as (figure, axes):
        axes.axhline(1, color=BASE, lw=1.2, ls="--", label="base")
        ratios = []
        for number, (label, (colour, marker, losses)) in enumerate(stages.items()):
            points = [
                (group.index + 0.18 * (number - 1), loss / group.loss_base)
                for group, loss in zip(results.groups, losses, strict=True)
                if loss is not None and group.loss_base > 0
            ]
            ratios += [ratio for _, ratio in points]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, label=label, ms=6)
        _wide_range(axes, ratios)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="group (noisier to the right)", ylabel="loss / the base's loss")
        axes.margins(x=0.08)
        figure.legend(loc="outside upper center", ncols=4, handletextpad=0.3, columnspacing=1.1)
        return svg_of(figure, name)


def differences_of_groups(comparison: ComparisonResult, name: str) -> str:
    """Draw how far TDC's loss is from that of the base trained on, by group, with intervals."""
    with drawing() as (figure, axes):
        axes.axhline(0, color=BASE, lw=1.2, ls="--")
        for group in comparison.groups:
            low, middle, high = (
                100 * value / group.loss_base if group.loss_base else 0.0
                for value in (group.low, group.difference, group.high)
            )
            axes.plot([group.index] * 2, [low, high], color="tab:blue")
            axes.plot(group.index, middle, "o", color="tab:blue", ms=6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="group (noisier to the right)", ylabel="difference in %")
        axes.margins(x=0.08)
        return svg_of(figure, name)


def rounds_of_groups(memory: Sequence[MemoryEntry], results: Results | None, name: str) -> str:
    """Draw mean and standard deviation over a round's candidates, relative to the base's loss."""
    with drawing() as (figure, axes):
        ratios: list[float] = []
        by_group = relative_rounds(memory, results)
        for (group, by_round), colour in zip(by_group.items(), cycle(CYCLE), strict=False):
            rounds = sorted(by_round)
            losses = [by_round[number] for number in rounds]
            mean = np.array([fmean(values) for values in losses])
            spread = np.array([stdev(values) if len(values) > 1 else 0.0 for values in losses])
            numbers = [number + 1 for number in rounds]
            axes.plot(numbers, mean, "o-", color=colour, label=f"group {group}", ms=4)
            low, high = mean - spread, mean + spread
            axes.fill_between(numbers, low, high, color=colour, alpha=0.16, lw=0)
            ratios += [*mean, *high]
        if results is not None:
            axes.axhline(1, color=BASE, lw=1.2, ls="--", label="base")
            ratios.append(1.0)
        _wide_range(axes, ratios)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        of = "the base's" if results is not None else "the first round's mean"
        axes.set(xlabel="round", ylabel=f"loss / {of}")
        figure.legend(loc="outside upper center", ncols=4, handletextpad=0.4, columnspacing=1.1)
        return svg_of(figure, name)


def relative_rounds(
    memory: Sequence[MemoryEntry], results: Results | None
) -> Mapping[int, Mapping[int, list[float]]]:
    """Return each group's losses by round over the base's, or without it over round 1's mean."""
    losses: dict[int, dict[int, list[float]]] = {}
    for entry in memory:
        if np.isfinite(entry.loss):
            losses.setdefault(entry.group, {}).setdefault(entry.round, []).append(entry.loss)
    relative: dict[int, dict[int, list[float]]] = {}
    bases = {} if results is None else {group.index: group.loss_base for group in results.groups}
    for group, by_round in sorted(losses.items()):
        whole = bases.get(group) or float(np.mean(by_round[min(by_round)]))
        if whole > 0:
            relative[group] = {n: [loss / whole for loss in row] for n, row in by_round.items()}
    return relative


def stages_of_time(seconds: StageSeconds, name: str) -> str:
    """Draw how the workers' time was used."""
    stages = {
        "base": (seconds.base, "tab:gray"),
        "pruning": (seconds.prune, "tab:blue"),
        "fine-tunes": (seconds.finetune, "tab:green"),
        "evaluation": (seconds.evaluate, "tab:purple"),
    }
    most = max(spent for spent, _ in stages.values())
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next(unit for unit, length in units.items() if most >= 2 * length or length == 1)
    with drawing((SIZE[0], 2.2)) as (figure, axes):
        for row, (spent, colour) in enumerate(stages.values()):
            axes.barh(row, spent / units[unit], color=colour, alpha=0.75, height=0.62)
        axes.set_yticks(range(len(stages)), list(stages))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=f"{unit} of workers")
        return svg_of(figure, name)


def time_over_macs(results: Results, times: TimesResult, name: str) -> str:
    """Draw the share of time over that of macs."""
    with drawing() as (figure, axes):
        axes.axline((0, 0), (1, 1), color=BASE, lw=1.2, ls="--", zorder=1)
        axes.plot(1, 1, "o", color=BASE, ms=7)
        labelled: list[tuple[float, float]] = []
        for group, milliseconds in zip(results.groups, times.experts_ms, strict=True):
            point = (group.macs / results.base.macs, milliseconds / times.base_ms)
            axes.plot(*point, "o", color="tab:blue", ms=6, alpha=0.75)
            if all(max(abs(point[0] - x), abs(point[1] - y)) > 0.03 for x, y in labelled):
                labelled.append(point)
                axes.annotate(
                    str(group.index), point, xytext=(5, 5), textcoords="offset points", fontsize=9
                )
        axes.set(xlabel="macs / the base's", ylabel="time / the base's")
        axes.margins(0.1)
        return svg_of(figure, name)


def _wide_range(axes: Axes, values: Sequence[float]) -> None:
    """Set a logarithmic axis where values differ by more than a factor of 10."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())

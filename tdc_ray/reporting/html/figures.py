"""The report's plots, as SVG that takes its colours and its font from the page.

Matplotlib draws them in its own colours, each of which becomes a variable of the page's style, so
that one picture is right on dark and on light.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from tdc_ray.diffusion.plan import Plan
from tdc_ray.execution.timeline import History
from tdc_ray.reporting.console import macs_text, plan_figure
from tdc_ray.reporting.html.load import RunData
from tdc_ray.reporting.workers import timeline_figure
from tdc_ray.runs.results import Results, StageSeconds

SIZE = (4.6, 3.1)
"""Of a plot, in inches: at a phone's width its letters are as large as the page's small ones."""

BASE = "tab:gray"
CYCLE = [f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # C7 is the base's

MAX_LABEL = 18
"""Most letters of a label in a plot; of longer ones the end is shown."""

_VARIABLES = {
    "#1f77b4": "--c0",
    "#ff7f0e": "--c1",
    "#2ca02c": "--c2",
    "#d62728": "--c3",
    "#9467bd": "--c4",
    "#8c564b": "--c5",
    "#e377c2": "--c6",
    "#7f7f7f": "--c7",
    "#bcbd22": "--c8",
    "#17becf": "--c9",
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


@dataclass(frozen=True, slots=True)
class Point:
    """A model in a plot of scores."""

    label: str
    score: float
    macs: float
    """Of a denoising step."""

    train_macs: float | None
    """Of its training, search included; None: they are not known."""

    is_base: bool
    is_best: bool = False
    """Whether it is on the Pareto front."""


def svg_of(figure: Figure, name: str) -> str:
    """Give a figure as an SVG element.

    Args:
        figure: What was drawn.
        name: Other than that of any other picture on the page: it goes into the ids.
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
    """Give an empty figure in the report's style."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots()


def figure_1(
    points: Sequence[Point], metric: str, name: str, *, over_training: bool = False
) -> str:
    """Draw scores; a circle's area goes with the macs of a step, as in the paper's Figure 1.

    Args:
        points: The models; what lies on others that have a label gets none.
        metric: Name of the scores.
        name: Of the picture.
        over_training: Whether scores stand over the macs of training, not of a step.
    """
    with drawing() as (figure, axes):
        most = max(point.macs for point in points)
        places = [(p.train_macs if over_training else p.macs) or 0.0 for p in points]
        for point, place in zip(points, places, strict=True):
            colour = BASE if point.is_base else "tab:orange" if point.is_best else "tab:blue"
            area, order = 260 * point.macs / most, 3 if point.is_best else 2
            axes.scatter(
                place,
                point.score,
                s=area,
                color=colour,
                alpha=0.55,
                ec=colour,
                lw=1.2,
                zorder=order,
            )
        for point, place in _labelled(points, places):
            label = point.label
            axes.annotate(
                label if len(label) <= MAX_LABEL else f"…{label[1 - MAX_LABEL :]}",
                (place, point.score),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        front = sorted(
            (place, p.score) for p, place in zip(points, places, strict=True) if p.is_best
        )
        falls = all(a[1] > b[1] for a, b in pairwise(front))  # it is one of other objectives else
        if len(front) > 1 and falls:
            axes.plot(*zip(*front, strict=True), color="tab:orange", lw=1.2, ls="--", zorder=1)
        axes.margins(0.22, 0.25)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda m, _: f"{m:.3g}" if over_training else macs_text(m))
        )
        below = "macs of training and search" if over_training else "macs of a denoising step"
        axes.set(xlabel=below, ylabel=f"{metric} (lower is better)")
        return svg_of(figure, name)


def _labelled(points: Sequence[Point], places: Sequence[float]) -> Iterator[tuple[Point, float]]:
    """Choose the points that have room for a label: bases and the best ones first."""
    width = (max(places) - min(places)) or 1.0
    scores = [point.score for point in points]
    height = (max(scores) - min(scores)) or 1.0
    found: list[tuple[Point, float]] = []
    ranked = sorted(
        zip(points, places, strict=True), key=lambda p: (not p[0].is_base, not p[0].is_best)
    )
    for point, place in ranked:
        is_free = all(
            abs(place - other) / width > 0.3 or abs(point.score - one.score) / height > 0.12
            for one, other in found
        )
        if point.label and is_free:
            found.append((point, place))
            yield point, place


def plan_over_timesteps(plan: Plan, name: str) -> str:
    """Draw the limits and the SNR over the timesteps."""
    with mpl.rc_context({**_STYLE, "axes.spines.right": True, "axes.grid": False}):
        return svg_of(plan_figure(plan, SIZE), name)


def plan_over_snr(plan: Plan, results: Results | None, name: str) -> str:
    """Draw every group's limit, and what its expert takes, over the signal-to-noise ratio."""
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
    """Draw what cut, refit and fine-tune make of each group's loss, relative to the base's."""
    stages: dict[str, tuple[str, str, Sequence[float | None]]] = {
        "cut": ("tab:red", "^", [group.loss_cut for group in results.groups]),
        "refit": ("tab:orange", "s", [group.loss_refit for group in results.groups]),
        "fine-tuned": ("tab:blue", "o", [group.loss_finetuned for group in results.groups]),
    }
    with drawing() as (figure, axes):
        axes.axhline(1, color=BASE, lw=1.2, ls="--", label="base")
        ratios = []
        for place, (label, (colour, marker, losses)) in enumerate(stages.items()):
            found = [
                (group.index + 0.18 * (place - 1), loss / group.loss_base)
                for group, loss in zip(results.groups, losses, strict=True)
                if loss is not None and group.loss_base > 0
            ]
            ratios += [ratio for _, ratio in found]
            if found:
                axes.plot(*zip(*found, strict=True), marker, color=colour, label=label, ms=6)
        _wide_range(axes, ratios)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="group (noisier to the right)", ylabel="loss / the base's loss")
        axes.margins(x=0.08)
        figure.legend(loc="outside upper center", ncols=4, handletextpad=0.3, columnspacing=1.1)
        return svg_of(figure, name)


def rounds_of_groups(run: RunData, name: str) -> str:
    """Draw mean and standard deviation over a round's candidates, relative to the base's loss."""
    with drawing() as (figure, axes):
        ratios: list[float] = []
        for (group, by_round), colour in zip(
            relative_rounds(run).items(), CYCLE * 100, strict=False
        ):
            rounds = sorted(by_round)
            losses = [by_round[number] for number in rounds]
            middle = np.array([fmean(some) for some in losses])
            spread = np.array([stdev(some) if len(some) > 1 else 0.0 for some in losses])
            shown = [number + 1 for number in rounds]
            axes.plot(shown, middle, "o-", color=colour, label=f"group {group}", ms=4)
            low, high = middle - spread, middle + spread
            axes.fill_between(shown, low, high, color=colour, alpha=0.16, lw=0)
            ratios += [*middle, *high]
        if run.results is not None:
            axes.axhline(1, color=BASE, lw=1.2, ls="--", label="base")
            ratios.append(1.0)
        _wide_range(axes, ratios)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        of = "the base's" if run.results is not None else "the first round's mean"
        axes.set(xlabel="round", ylabel=f"loss / {of}")
        figure.legend(loc="outside upper center", ncols=4, handletextpad=0.4, columnspacing=1.1)
        return svg_of(figure, name)


def relative_rounds(run: RunData) -> Mapping[int, Mapping[int, list[float]]]:
    """Give each group's losses by round over the base's, or the first round's mean without it."""
    losses: dict[int, dict[int, list[float]]] = {}
    for entry in run.memory:
        if np.isfinite(entry.loss):
            losses.setdefault(entry.group, {}).setdefault(entry.round, []).append(entry.loss)
    found: dict[int, dict[int, list[float]]] = {}
    bases = {} if run.results is None else {g.index: g.loss_base for g in run.results.groups}
    for group, by_round in sorted(losses.items()):
        whole = bases.get(group) or float(np.mean(by_round[min(by_round)]))
        if whole > 0:
            found[group] = {n: [loss / whole for loss in some] for n, some in by_round.items()}
    return found


def stages_of_time(seconds: StageSeconds, name: str) -> str:
    """Draw where the workers' time went."""
    stages = ("base", "prune", "finetune", "evaluate")
    colours = ("tab:gray", "tab:blue", "tab:green", "tab:purple")
    most = max(getattr(seconds, stage) for stage in stages)
    unit, length = next(
        (name, length)
        for name, length in (("hours", 3600), ("minutes", 60), ("seconds", 1))
        if most >= 2 * length or length == 1
    )
    with drawing((SIZE[0], 2.2)) as (figure, axes):
        for place, (stage, colour) in enumerate(zip(stages, colours, strict=True)):
            axes.barh(
                place, getattr(seconds, stage) / length, color=colour, alpha=0.75, height=0.62
            )
        axes.set_yticks(range(len(stages)), ["base", "pruning", "fine-tunes", "evaluation"])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=f"{unit} of workers")
        return svg_of(figure, name)


def timeline(history: History, name: str) -> str:
    """Draw who ran what, when."""
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        figure = timeline_figure(history)
        figure.axes[0].set_title("")  # the page has it
        return svg_of(figure, name)


def _wide_range(axes: Axes, values: Sequence[float]) -> None:
    """Take a logarithmic axis where values differ by more than a factor of 10."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())

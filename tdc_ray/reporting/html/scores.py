"""Scores against macs: the paper's Figure 1 for runs and for sweeps."""

import math
from collections.abc import Iterator, Mapping, Sequence

from tdc_ray.reporting.figures import Point, score_figure
from tdc_ray.reporting.html.blocks import Plot
from tdc_ray.reporting.html.load import SweepData
from tdc_ray.reporting.models import LONGER_BASE
from tdc_ray.runs.results import Results


def run_points(runs: Mapping[str, Results]) -> dict[str, list[Point]]:
    """Return bases and experts as points, by metric: other scores cannot be compared."""
    points: dict[str, list[Point]] = {}
    for name, results in runs.items():
        base, tdc, searched = results.base, results.tdc, results.prune.search_macs
        trained = base.train_macs if results.given_base is None else None
        of_metric = points.setdefault(results.metric, [])
        point = Point("base", base.score, base.macs, trained, is_base=True)
        if point not in of_metric:
            of_metric.append(point)
        if (comparison := results.comparison) is not None:
            longer = Point(
                LONGER_BASE, comparison.score, base.macs, comparison.train_macs, is_base=True
            )
            of_metric.append(longer)
        label = name if len(runs) > 1 else "TDC"
        spent = tdc.train_macs + searched
        of_metric.append(Point(label, tdc.score, tdc.macs, spent, is_base=False))
    return points


def trial_points(data: SweepData) -> dict[str, list[Point]]:
    """Return the trials of a sweep as points, with their bases where known."""
    points = {
        metric: [point for point in of_metric if point.is_base]
        for metric, of_metric in run_points(data.results).items()
    }
    for trial in data.sweep.rows:
        if trial.score is None or trial.macs is None:
            continue
        spent = None if trial.train_macs is None else trial.train_macs + (trial.search_macs or 0.0)
        is_best = data.is_best(trial)
        point = Point(trial.name, trial.score, trial.macs, spent, is_base=False, is_best=is_best)
        points.setdefault(trial.metric or "score", []).append(point)
    return points


def score_over_macs(
    by_metric: Mapping[str, Sequence[Point]], key: str, *, over_training: bool
) -> Iterator[Plot]:
    """Draw scores against macs, and against those of training, for each metric."""
    for number, (metric, candidates) in enumerate(by_metric.items()):
        points = [
            p for p in candidates if math.isfinite(p.score) and math.isfinite(p.macs) and p.macs
        ]
        known = [point for point in points if math.isfinite(point.train_macs or math.nan)]
        front = " Orange: the Pareto front." if any(p.is_best for p in points) else ""
        colours = f"Gray: bases; blue: TDC.{front}"
        if points:
            yield Plot(
                svg=score_figure(points, metric, f"{key}-figure-1-{number}"),
                title="Score against macs",
                caption="As the paper's Figure 1: a circle's area goes with the macs of a step. "
                f"{colours} Lower and further to the left is better.",
            )
        if over_training and known:
            yield Plot(
                svg=score_figure(known, metric, f"{key}-train-{number}", over_training=True),
                title="Score against what training took",
                caption=f"Base and experts, search included. {colours}",
            )

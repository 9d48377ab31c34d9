"""Runs side by side in a terminal."""

from collections.abc import Callable, Sequence

from rich.console import Console

from tdc_ray.reporting.console import TextColumn, table_of
from tdc_ray.reporting.models import LONGER_BASE
from tdc_ray.reporting.text import macs_text, millions_text, short_names
from tdc_ray.runs.overview import RunOverview, differing
from tdc_ray.runs.results import Results, score_text

NAME_WIDTH = 20
"""Characters of a run's name in a line, at least."""


def print_runs(console: Console, runs: Sequence[RunOverview]) -> None:
    """Print a line for each run."""
    names = dict(zip(map(id, runs), short_names([run.root for run in runs]), strict=True))
    columns: list[TextColumn[RunOverview]] = [
        ("run", lambda run: names[id(run)]),
        ("progress", lambda run: run.progress),
        ("base", _of_results(lambda r: score_text(r.base.score))),
        ("TDC", _of_results(lambda r: score_text(r.tdc.score))),
        ("macs / base", _of_results(lambda r: f"{r.tdc.macs / r.base.macs:.3f}")),
    ]
    table = table_of(runs, columns, left=("run", "progress"))
    table.columns[0].min_width = NAME_WIDTH
    console.print(table)
    if metrics := sorted({run.results.metric for run in runs if run.results is not None}):
        console.print(f"scores: {', '.join(metrics)}; lower is better", soft_wrap=True)


def print_comparison(console: Console, runs: Sequence[RunOverview]) -> None:
    """Print in which settings runs differ, and what each came to, a column for each run."""
    names = short_names([run.root for run in runs])

    def of_run(place: int) -> Callable[[tuple[str, Sequence[str]]], str]:
        return lambda row: row[1][place]

    def print_rows(title: str, rows: Sequence[tuple[str, Sequence[str]]]) -> None:
        columns: list[TextColumn[tuple[str, Sequence[str]]]] = [("", lambda row: row[0])]
        columns += [(name, of_run(place)) for place, name in enumerate(names)]
        console.print(table_of(rows, columns, title=title, left=("", *names)))

    settings = [(name, list(map(str, values))) for name, values in differing(runs).items()]
    if settings:
        print_rows("settings that differ", settings)
    else:
        console.print("all settings are the same")
    found = [run.results.tdc.metrics for run in runs if run.results is not None]
    names_of_others = dict.fromkeys(name for metrics in found for name in metrics)
    others = [(f"{name} of TDC", _other_score(name)) for name in names_of_others]
    print_rows(
        "results",
        [(label, [text(run) for run in runs]) for label, text in (*_RESULTS, *others)],
    )


def _of_results(text: Callable[[Results], str]) -> Callable[[RunOverview], str]:
    return lambda run: "" if run.results is None else text(run.results)


def _other_score(name: str) -> Callable[[RunOverview], str]:
    def text(results: Results) -> str:
        value = results.tdc.metrics.get(name)
        return "" if value is None else f"{value:.4g}"

    return _of_results(text)


def _of_comparison(results: Results) -> str:
    return "" if results.comparison is None else score_text(results.comparison.score)


_RESULTS: Sequence[TextColumn[RunOverview]] = (
    ("progress", lambda run: run.progress),
    ("metric", _of_results(lambda r: r.metric)),
    ("base", _of_results(lambda r: score_text(r.base.score))),
    (LONGER_BASE, _of_results(_of_comparison)),
    ("TDC", _of_results(lambda r: score_text(r.tdc.score))),
    ("base: FLOPs (MACs)", _of_results(lambda r: macs_text(r.base.macs))),
    ("TDC: FLOPs (MACs)", _of_results(lambda r: macs_text(r.tdc.macs))),
    ("base: params", _of_results(lambda r: millions_text(r.base.num_params))),
    ("TDC: params", _of_results(lambda r: millions_text(r.tdc.num_params))),
    ("base: train macs", _of_results(lambda r: f"{r.base.train_macs:.2e}")),
    ("TDC: train macs", _of_results(lambda r: f"{r.tdc.train_macs:.2e}")),
    ("search macs", _of_results(lambda r: f"{r.prune.search_macs:.2e}")),
    ("wall seconds", _of_results(lambda r: f"{r.seconds.wall:.0f}")),
)
"""What of each run stands in a row."""

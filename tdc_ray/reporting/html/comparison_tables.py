"""The report's tables of several runs, and of the trials of a sweep."""

from collections.abc import Callable, Mapping, Sequence

from tdc_ray.reporting.html.blocks import Kind, Table, Value, table_of
from tdc_ray.reporting.html.load import RunData, SweepData
from tdc_ray.reporting.models import LONGER_BASE
from tdc_ray.reporting.paper import (
    DATASETS,
    NO_PRUNING,
    SWEPT,
    TABLE_1,
    is_of_the_paper,
    paper_dataset,
)
from tdc_ray.runs.results import HELD_OUT_LOSS, Results
from tdc_ray.runs.sweep.results import SettingSummary, SweepResults, TrialRow


def runs_table(runs: Sequence[RunData], links: Mapping[str, str]) -> Table:
    """Return a row for each run."""
    scored = [run for run in runs if run.results and run.results.metric != HELD_OUT_LOSS]
    datasets = dict.fromkeys(DATASETS[paper_dataset(run.preset)] for run in scored)
    note = "The paper's FID is that of its own data" if scored else ""
    if not all(is_of_the_paper(run.preset) for run in scored):
        note += ", and CIFAR-10's where it has none: only the order can be compared"

    def of(value: Callable[[Results], Value]) -> Callable[[RunData], Value]:
        return lambda run: None if run.results is None else value(run.results)

    fid: list[tuple[str, Kind, Callable[[RunData], Value]]] = []
    if scored:
        name = f"the paper's FID of TDC ({', '.join(datasets)})"
        fid = [(name, "number", of(_fid_of_the_paper))]
    return table_of(
        "runs",
        "Runs",
        runs,
        [
            ("run", "text", lambda run: run.name),
            ("preset", "text", lambda run: run.preset),
            ("seed", "number", lambda run: run.seed),
            ("metric", "text", lambda run: run.results.metric if run.results else "not finished"),
            ("base", "score", of(lambda r: r.base.score)),
            (LONGER_BASE, "score", of(lambda r: r.comparison.score if r.comparison else None)),
            ("TDC", "score", of(lambda r: r.tdc.score)),
            ("base: FLOPs (MACs)", "macs", of(lambda r: r.base.macs)),
            ("TDC: FLOPs (MACs)", "macs", of(lambda r: r.tdc.macs)),
            ("share of F", "share", of(lambda r: r.tdc.macs / r.base.macs)),
            ("TDC: params", "millions", of(lambda r: r.tdc.num_params)),
            ("base: train macs", "power", of(lambda r: r.base.train_macs)),
            ("TDC: train macs", "power", of(lambda r: r.tdc.train_macs)),
            ("search macs", "power", of(lambda r: r.prune.search_macs)),
            ("wall", "seconds", of(lambda r: r.seconds.wall)),
            *fid,
        ],
        links=[links.get(run.name) for run in runs],
        note=note and f"{note}.",
    )


def _fid_of_the_paper(results: Results) -> float | None:
    if results.metric == HELD_OUT_LOSS:
        return None
    label = NO_PRUNING if results.prune.method == "none" else "TDC"
    return TABLE_1[paper_dataset(results.preset)][label].fid


def trials_table(data: SweepData, links: Mapping[str, str]) -> Table:
    """Return a row for each trial; those of the Pareto front are highlighted."""
    trials, labels = data.sweep.rows, data.sweep.labels
    columns: list[tuple[str, Kind, Callable[[TrialRow], Value]]] = [
        ("trial", "text", lambda trial: trial.name),
        *((label, "text", _setting_of(name)) for name, label in labels.items()),
        ("seed", "number", lambda trial: trial.seed),
        ("status", "text", lambda trial: trial.status),
        (data.sweep.metric, "score", lambda trial: trial.score),
        ("FLOPs (MACs)", "macs", lambda trial: trial.macs),
        ("params", "millions", lambda trial: trial.num_params),
        ("train macs", "power", lambda trial: trial.train_macs),
        ("of these reused", "power", lambda trial: trial.reused_train_macs),
        ("search macs", "power", lambda trial: trial.search_macs),
        ("time", "seconds", lambda trial: trial.seconds),
        ("Pareto front", "text", lambda trial: "yes" if data.is_best(trial) else ""),
    ]
    varied = next(iter(labels)) if len(labels) == 1 else ""
    paper = None if data.sweep.metric == HELD_OUT_LOSS else SWEPT.get(varied)
    if paper is not None:
        fid = "the paper's FID (CIFAR-10)"
        columns.append((fid, "number", lambda trial: paper.get(trial.params.get(varied))))
    if any(trial.error for trial in trials):
        columns.append(("error", "text", lambda trial: trial.error))
    return table_of(
        "trials",
        "Trials",
        trials,
        columns,
        links=[links.get(trial.name) for trial in trials],
        marked=frozenset(n for n, trial in enumerate(trials) if data.is_best(trial)),
        note="" if paper is None else "The paper's FID: Tables II, III (without pruning) and VI.",
    )


def _setting_of(name: str) -> Callable[[TrialRow], Value]:
    def value(trial: TrialRow) -> Value:
        setting = trial.params.get(name)
        return None if setting is None else str(setting)

    return value


def settings_table(data: SweepData) -> Table | None:
    """Return mean and spread over the seeds of every setting, if any has several seeds."""
    if not any(setting.num_done > 1 for setting in data.sweep.settings):
        return None
    return table_of(
        "settings",
        "Mean over the seeds",
        [setting for setting in data.sweep.settings if setting.num_done],
        [
            ("setting", "text", lambda setting: setting_text(data.sweep, setting)),
            ("seeds", "count", lambda setting: setting.num_done),
            (data.sweep.metric, "score", lambda setting: setting.mean["score"]),
            ("deviation", "score", lambda setting: setting.spread.get("score")),
            ("FLOPs (MACs)", "macs", lambda setting: setting.mean["macs"]),
            ("train macs", "power", lambda setting: setting.mean["train_macs"]),
            ("search macs", "power", lambda setting: setting.mean["search_macs"]),
        ],
    )


def setting_text(sweep: SweepResults, setting: SettingSummary) -> str:
    """Return what a setting varies, by the fields' labels."""
    params = setting.params.items()
    return ", ".join(f"{sweep.labels.get(name, name)} = {value}" for name, value in params)

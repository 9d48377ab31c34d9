"""The report's tables of several runs, and of the trials of a sweep."""

from collections.abc import Mapping, Sequence

from tdc_ray.reporting.html.blocks import Column, Table, Value
from tdc_ray.reporting.html.load import RunData, SweepData
from tdc_ray.reporting.html.paper_columns import (
    DATASETS,
    NO_PRUNING,
    SWEPT,
    TABLE_1,
    is_of_the_paper,
    paper_dataset,
)
from tdc_ray.runs.sweep.results import SettingSummary, SweepResults


def runs_table(runs: Sequence[RunData], links: Mapping[str, str]) -> Table:
    """Give a row to each run."""
    rows: list[tuple[Value, ...]] = []
    for run in runs:
        found = run.results
        row: tuple[Value, ...] = (run.name, run.preset, run.seed)
        if found is None:
            rows.append((*row, "not finished", *(None,) * 11))
            continue
        dataset = paper_dataset(run.preset)
        label = NO_PRUNING if found.prune.method == "none" else "TDC"
        rows.append(
            (
                *row,
                found.metric,
                found.base.score,
                found.tdc.score,
                found.base.macs,
                found.tdc.macs,
                found.tdc.macs / found.base.macs,
                found.tdc.num_params,
                found.base.train_macs,
                found.tdc.train_macs,
                found.prune.search_macs,
                found.seconds.wall,
                TABLE_1[dataset][label].fid,
            )
        )
    datasets = dict.fromkeys(DATASETS[paper_dataset(run.preset)] for run in runs)
    note = "The paper's FID is that of its own data"
    if not all(is_of_the_paper(run.preset) for run in runs):
        note += ", and CIFAR-10's where it has none: only the order can be compared"
    return Table(
        name="runs",
        title="Runs",
        columns=(
            Column("run"),
            Column("preset"),
            Column("seed", "number"),
            Column("metric"),
            Column("base", "score"),
            Column("TDC", "score"),
            Column("base: FLOPs (MACs)", "macs"),
            Column("TDC: FLOPs (MACs)", "macs"),
            Column("share of F", "share"),
            Column("TDC: params", "millions"),
            Column("base: train macs", "power"),
            Column("TDC: train macs", "power"),
            Column("search macs", "power"),
            Column("wall", "seconds"),
            Column(f"the paper's FID of TDC ({', '.join(datasets)})", "number"),
        ),
        rows=rows,
        links=[links.get(run.name) for run in runs],
        note=f"{note}.",
    )


def trials_table(data: SweepData, links: Mapping[str, str]) -> Table:
    """Give a row to each trial; those of the Pareto front stand out."""
    trials, labels = data.sweep.rows, data.sweep.labels
    names = list(labels)
    paper = SWEPT.get(names[0]) if len(names) == 1 else None
    columns = [
        Column("trial"),
        *(Column(label) for label in labels.values()),
        Column("seed", "number"),
        Column("status"),
        Column(data.sweep.metric, "score"),
        Column("FLOPs (MACs)", "macs"),
        Column("params", "millions"),
        Column("train macs", "power"),
        Column("of these reused", "power"),
        Column("search macs", "power"),
        Column("time", "seconds"),
        Column("Pareto front"),
    ]
    failed = any(trial.error for trial in trials)
    if paper is not None:
        columns.append(Column("the paper's FID (CIFAR-10)", "number"))
    if failed:
        columns.append(Column("error"))
    rows = [
        (
            trial.name,
            *(_setting(trial.params.get(name)) for name in names),
            trial.seed,
            trial.status,
            trial.score,
            trial.macs,
            trial.num_params,
            trial.train_macs,
            trial.reused_train_macs,
            trial.search_macs,
            trial.seconds,
            "yes" if data.is_best(trial) else "",
            *(() if paper is None else (paper.get(trial.params.get(names[0])),)),
            *((trial.error,) if failed else ()),
        )
        for trial in trials
    ]
    return Table(
        name="trials",
        title="Trials",
        columns=columns,
        rows=rows,
        links=[links.get(trial.name) for trial in trials],
        note="" if paper is None else "The paper's FID: Tables II, III (without pruning) and VI.",
        marked=frozenset(n for n, trial in enumerate(trials) if data.is_best(trial)),
    )


def settings_table(data: SweepData) -> Table | None:
    """Give mean and spread over the seeds of every setting, if any has several seeds."""
    if not any(setting.num_done > 1 for setting in data.sweep.settings):
        return None
    rows: list[tuple[Value, ...]] = [
        (
            setting_text(data.sweep, setting),
            setting.num_done,
            setting.mean["score"],
            setting.spread.get("score"),
            setting.mean["macs"],
            setting.mean["train_macs"],
            setting.mean["search_macs"],
        )
        for setting in data.sweep.settings
        if setting.num_done
    ]
    return Table(
        name="settings",
        title="Mean over the seeds",
        columns=(
            Column("setting"),
            Column("seeds", "count"),
            Column(data.sweep.metric, "score"),
            Column("deviation", "score"),
            Column("FLOPs (MACs)", "macs"),
            Column("train macs", "power"),
            Column("search macs", "power"),
        ),
        rows=rows,
    )


def setting_text(sweep: SweepResults, setting: SettingSummary) -> str:
    """Say what a setting varies, by the fields' labels."""
    params = setting.params.items()
    return ", ".join(f"{sweep.labels.get(name, name)} = {value}" for name, value in params)


def _setting(value: object) -> str | None:
    return None if value is None else str(value)

"""``sweep.json``: one row a run, a summary a setting, and which settings no other one beats."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from tdc_ray.config.run import RunConfig, differences, from_json, to_json
from tdc_ray.config.sweep import Objective, SweepConfig
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.runs.results import Results, load_checked, load_results
from tdc_ray.runs.sweep.space import Domain, Params, Value, labels, setting_name, trial_name
from tdc_ray.storage.files import exists, read_json, write_json
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.provenance import commit, machine
from tdc_ray.storage.run_dir import RunDir

FORMAT = 1
SWEEP_FILE = "sweep.json"
CONFIG_FILE = "config.json"
TRIALS_DIR = "trials"

TrialStatus = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow:
    """One run: a setting with one seed. What it has not come to yet is None."""

    name: str
    setting: str
    """Name of the setting, of which there is a run for every seed."""

    params: Mapping[str, Value]
    seed: int
    run_dir: str
    """Relative to the sweep's folder."""

    status: TrialStatus
    """stopped: by the scheduler, before its end."""

    error: str | None = None
    metric: str | None = None
    score: float | None = None
    macs: float | None = None
    num_params: float | None = None
    train_macs: float | None = None
    """Of base and experts, as if the run stood alone: also what it took from the store."""

    search_macs: float | None = None
    computed_train_macs: float | None = None
    """What of that was computed for this run ..."""

    reused_train_macs: float | None = None
    """... and what had been for another one."""

    computed_search_macs: float | None = None
    reused_search_macs: float | None = None
    items_computed: int | None = None
    items_reused: int | None = None
    base_score: float | None = None
    base_macs: float | None = None
    base_num_params: float | None = None
    base_train_macs: float | None = None
    seconds: float | None = None
    """Of the attempt that finished the run."""

    commit: str | None = None
    """That finished the run."""


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """An event: a run of a sweep is done; comes again when the sweep is resumed."""

    config: RunConfig
    """The settings that the sweep varies."""

    row: TrialRow


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingSummary:
    """What the runs of a setting with all seeds come to."""

    name: str
    params: Mapping[str, Value]
    num_done: int
    mean: Mapping[str, float]
    """Of score, macs, num_params, train_macs, search_macs and seconds; empty: none is done."""

    spread: Mapping[str, float]
    """Sample standard deviation; empty where fewer than two are done."""

    pareto: bool
    """No other setting with as many runs done is as good in all objectives and better in one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResults:
    """The whole of ``sweep.json``."""

    format: int = FORMAT
    name: str
    search: str
    space: Mapping[str, Any]
    """What was searched: values, or low, high, log and whole, by the fields' dotted names."""

    labels: Mapping[str, str]
    """What the fields are called."""

    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    preset: str
    commit: str | None
    machine: str
    rows: tuple[TrialRow, ...] = ()
    settings: tuple[SettingSummary, ...] = ()
    pareto: tuple[str, ...] = ()
    """Names of the settings on the Pareto front of the objectives; of one, of the best."""

    @property
    def metric(self) -> str:
        """What the scores are, or "score" where no run is done."""
        return next((row.metric for row in self.rows if row.metric), "score")

    @property
    def computed_share(self) -> float | None:
        """Share that was computed of the macs that training and search of each run take alone.

        None where runs are not done: what they computed, others may have taken.
        """
        if any(row.status != "done" for row in self.rows):
            return None
        rows = self.rows
        computed = sum((r.computed_train_macs or 0) + (r.computed_search_macs or 0) for r in rows)
        reused = sum((r.reused_train_macs or 0) + (r.reused_search_macs or 0) for r in rows)
        return computed / (computed + reused) if computed else None


_ADAPTER = TypeAdapter(SweepResults)
_MEANS = ("score", "macs", "num_params", "train_macs", "search_macs", "seconds")


def begun(
    folder: Path, config: RunConfig, space: Mapping[str, Domain], how: SweepConfig
) -> SweepResults:
    """Begin a sweep's results, with the rows of earlier calls.

    Raises:
        StorageError: The folder holds a sweep of other settings.
    """
    path = folder / CONFIG_FILE
    if not exists(path):
        write_json(path, to_json(config))
    try:
        changed = differences(from_json(read_json(path)), config)
    except ConfigError as error:
        raise StorageError(
            f"{display_path(path)} is of another version: {error} Choose another name."
        ) from error
    if changed:
        raise StorageError(
            f"sweep {display_path(folder)} has other settings: {'; '.join(changed)}. Use the same "
            "ones to go on, or another name."
        )
    # As they are when they were read again.
    domains = {name: json.loads(json.dumps(asdict(domain))) for name, domain in space.items()}
    rows: tuple[TrialRow, ...] = ()
    if exists(folder / SWEEP_FILE):
        before = load_sweep(folder)
        rows = before.rows
        if rows and list(rows[0].params) != list(space):
            raise StorageError(
                f"sweep {display_path(folder)} varies {', '.join(rows[0].params)}, in this order. "
                "Vary the same fields to go on, or choose another name."
            )
        asked, told = (domains, how.objectives), (before.space, before.objectives)
        if how.search != "grid" and asked != told:  # Optuna's study is of just these
            raise StorageError(
                f"sweep {display_path(folder)} searches {told[0]} for {', '.join(told[1])}. "
                "Search the same for the same objectives to go on, or choose another name."
            )
    return SweepResults(
        name=folder.name,
        search=how.search,
        space=domains,
        labels=labels(list(space)),
        objectives=how.objectives,
        seeds=how.seeds,
        preset=config.preset,
        commit=commit(),
        machine=machine(),
        rows=rows,
    )


def started_row(params: Params, seed: int) -> TrialRow:
    """Make the row of a run that begins."""
    name = trial_name(params, seed)
    return TrialRow(
        name=name,
        setting=setting_name(params),
        params=dict(params),
        seed=seed,
        run_dir=f"{TRIALS_DIR}/{name}",
        status="running",
    )


def ended_row(
    row: TrialRow, folder: Path, status: TrialStatus, error: str | None = None
) -> TrialRow:
    """Complete a row by the results of its run, if there are any.

    Args:
        row: The row.
        folder: The sweep's folder.
        status: What to say of a run without results.
        error: Why it has none.
    """
    path = RunDir(folder / row.run_dir).results
    if not exists(path):
        return replace(row, status=status, error=error)
    return with_results(row, load_results(path))


def with_results(row: TrialRow, results: Results) -> TrialRow:
    """Complete a row by results."""
    tdc, reuse = results.tdc, results.reuse
    return replace(
        row,
        status="done",
        error=None,
        metric=results.metric,
        score=tdc.score,
        macs=tdc.macs,
        num_params=tdc.num_params,
        train_macs=tdc.train_macs,
        search_macs=results.prune.search_macs,
        computed_train_macs=tdc.train_macs if reuse is None else reuse.train_macs_computed,
        reused_train_macs=0.0 if reuse is None else reuse.train_macs_reused,
        computed_search_macs=(
            results.prune.search_macs if reuse is None else reuse.search_macs_computed
        ),
        reused_search_macs=0.0 if reuse is None else reuse.search_macs_reused,
        items_computed=None if reuse is None else reuse.items_computed,
        items_reused=None if reuse is None else reuse.items_reused,
        base_score=results.base.score,
        base_macs=results.base.macs,
        base_num_params=results.base.num_params,
        base_train_macs=results.base.train_macs,
        seconds=results.seconds.wall,
        commit=results.commit,
    )


def summarized(sweep: SweepResults, rows: Sequence[TrialRow]) -> SweepResults:
    """Put rows, in the order of their names, and what they come to into a sweep's results."""
    ordered = sorted(rows, key=lambda row: (_numbers(row.params), row.seed))
    found: dict[str, list[TrialRow]] = {}
    for row in ordered:
        found.setdefault(row.setting, []).append(row)
    settings = [_setting(name, some) for name, some in found.items()]
    front = pareto(settings, sweep.objectives)
    settings = [replace(setting, pareto=setting.name in front) for setting in settings]
    return replace(
        sweep, rows=tuple(ordered), settings=tuple(settings), pareto=tuple(sorted(front))
    )


def pareto(settings: Sequence[SettingSummary], objectives: Sequence[Objective]) -> set[str]:
    """Name the settings that none dominates, by their means; unfinished ones are left out."""
    points = {
        setting.name: [setting.mean[name] for name in objectives]
        for setting in finished_settings(settings)
    }

    def dominates(one: list[float], other: list[float]) -> bool:
        return one != other and all(x <= y for x, y in zip(one, other, strict=True))

    return {
        name
        for name, point in points.items()
        if not any(dominates(other, point) for other in points.values())
    }


def finished_settings(settings: Sequence[SettingSummary]) -> list[SettingSummary]:
    """Give the settings of which as many runs are done as of any, if any are."""
    most = max((setting.num_done for setting in settings), default=0)
    return [setting for setting in settings if setting.num_done == most > 0]


def save_sweep(folder: Path, sweep: SweepResults) -> None:
    """Write ``sweep.json``."""
    write_json(folder / SWEEP_FILE, asdict(sweep))


def load_sweep(folder: Path) -> SweepResults:
    """Load what :func:`save_sweep` wrote.

    Raises:
        StorageError: There is none, or it is of another format.
    """
    return load_checked(folder / SWEEP_FILE, _ADAPTER, "format", FORMAT)


def _setting(name: str, rows: Sequence[TrialRow]) -> SettingSummary:
    done = [asdict(row) for row in rows if row.status == "done"]
    values = {key: [float(row[key]) for row in done] for key in _MEANS}
    return SettingSummary(
        name=name,
        params=rows[0].params,
        num_done=len(done),
        mean={key: statistics.mean(some) for key, some in values.items() if some},
        spread={key: statistics.stdev(some) for key, some in values.items() if len(some) > 1},
        pareto=False,
    )


def _numbers(params: Params) -> list[tuple[str, float, str]]:
    """Order settings by their values, numbers by size."""
    return [
        (name, float(value) if isinstance(value, int | float) else 0.0, str(value))
        for name, value in params.items()
    ]

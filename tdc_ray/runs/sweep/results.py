"""``sweep.json``: one row a run, a summary a setting, and the settings on the Pareto front."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from tdc_ray.config.run import RunConfig, to_json
from tdc_ray.config.sweep import Objective, SweepConfig
from tdc_ray.errors import StorageError
from tdc_ray.runs.results import load_checked
from tdc_ray.runs.sweep.space import Domain, Params, Value, labels
from tdc_ray.storage.files import exists, write_json
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.provenance import commit, machine

FORMAT = 1
SWEEP_FILE = "sweep.json"
CONFIG_FILE = "config.json"
TRIALS_DIR = "trials"

TrialStatus = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow:
    """One run: a setting with one seed. None means that the run has no results yet."""

    name: str
    setting: str
    """Name of the setting, which is run with every seed."""

    params: Mapping[str, Value]
    seed: int
    run_dir: str
    """Path relative to the sweep's folder."""

    status: TrialStatus
    """``stopped`` means that Tune's scheduler ended it early."""

    error: str | None = None
    metric: str | None = None
    score: float | None = None
    macs: float | None = None
    num_params: float | None = None
    train_macs: float | None = None
    """Macs of training base and experts, reused ones included."""

    search_macs: float | None = None
    computed_train_macs: float | None = None
    """Those computed for this run ..."""

    reused_train_macs: float | None = None
    """... and those computed for another one."""

    computed_search_macs: float | None = None
    reused_search_macs: float | None = None
    items_computed: int | None = None
    items_reused: int | None = None
    base_score: float | None = None
    base_macs: float | None = None
    base_num_params: float | None = None
    base_train_macs: float | None = None
    seconds: float | None = None
    """Time of the attempt that finished the run."""

    commit: str | None = None
    """Commit of the code that finished the run."""


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """An event: a run of a sweep is done; emitted again when the sweep is resumed."""

    settings: Params
    """Its k, N, schedule, proxy, and every field that is varied."""

    row: TrialRow


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """An event: how far a sweep is."""

    rows: Sequence[TrialRow]
    num_runs: int
    """Runs that the sweep has in all."""

    seconds: float
    """Since this call of it began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingSummary:
    """The results of a setting, over its seeds."""

    name: str
    params: Mapping[str, Value]
    num_done: int
    mean: Mapping[str, float]
    """Means of score, macs, num_params, train_macs, search_macs and seconds; empty if no run is
    done."""

    spread: Mapping[str, float]
    """Sample standard deviations; empty if fewer than two runs are done."""

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
    """Short names of the fields."""

    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    preset: str
    commit: str | None
    machine: str
    rows: tuple[TrialRow, ...] = ()
    settings: tuple[SettingSummary, ...] = ()
    pareto: tuple[str, ...] = ()
    """Names of the settings on the Pareto front of the objectives, or the best of one."""

    @property
    def metric(self) -> str:
        """Name of the metric, or "score" where no run is done."""
        return next((row.metric for row in self.rows if row.metric), "score")

    @property
    def computed_share(self) -> float | None:
        """Share of the macs of training and search that was computed, the rest being reused.

        None where runs are not done: others may have reused what these computed.
        """
        if any(row.status != "done" for row in self.rows):
            return None
        rows = self.rows
        computed = sum((r.computed_train_macs or 0) + (r.computed_search_macs or 0) for r in rows)
        reused = sum((r.reused_train_macs or 0) + (r.reused_search_macs or 0) for r in rows)
        return computed / (computed + reused) if computed else None


_ADAPTER = TypeAdapter(SweepResults)
_MEANS = ("score", "macs", "num_params", "train_macs", "search_macs", "seconds")


def open_results(
    folder: Path, config: RunConfig, space: Mapping[str, Domain], sweep_config: SweepConfig
) -> SweepResults:
    """Return a sweep's results so far: the rows of earlier calls.

    Raises:
        StorageError: The folder holds a sweep of other settings.
    """
    path = folder / CONFIG_FILE
    from tdc_ray.runs.preflight import refuse_other_settings  # imports torch, plan must not

    refuse_other_settings(path, config, "sweep", "name")
    if not exists(path):
        write_json(path, to_json(config))
    # As JSON has them, so that they can be compared with what is read.
    domains = {name: json.loads(json.dumps(asdict(domain))) for name, domain in space.items()}
    rows: tuple[TrialRow, ...] = ()
    if exists(folder / SWEEP_FILE):
        before = load_sweep(folder)
        rows = before.rows
        if rows and list(rows[0].params) != list(space):
            raise StorageError(
                f"sweep {display_path(folder)} varies {', '.join(rows[0].params)}, in this order. "
                "Vary the same fields to resume it, or choose another name."
            )
        is_same = (before.space, before.objectives) == (domains, sweep_config.objectives)
        if sweep_config.search != "grid" and not is_same:  # Optuna's study is of just these
            raise StorageError(
                f"sweep {display_path(folder)} searches {before.space} for "
                f"{', '.join(before.objectives)}. Search the same for the same objectives to "
                "resume it, or choose another name."
            )
    return SweepResults(
        name=folder.name,
        search=sweep_config.search,
        space=domains,
        labels=labels(list(space)),
        objectives=sweep_config.objectives,
        seeds=sweep_config.seeds,
        preset=config.preset,
        commit=commit(),
        machine=machine(),
        rows=rows,
    )


def with_rows(sweep: SweepResults, rows: Sequence[TrialRow]) -> SweepResults:
    """Return a sweep's results with these rows, in order, and their summaries."""
    ordered = sorted(rows, key=lambda row: (_sort_key(row.params), row.seed))
    by_setting: dict[str, list[TrialRow]] = {}
    for row in ordered:
        by_setting.setdefault(row.setting, []).append(row)
    settings = [_summary(name, rows) for name, rows in by_setting.items()]
    front = pareto(settings, sweep.objectives)
    settings = [replace(setting, pareto=setting.name in front) for setting in settings]
    return replace(
        sweep, rows=tuple(ordered), settings=tuple(settings), pareto=tuple(sorted(front))
    )


def pareto(settings: Sequence[SettingSummary], objectives: Sequence[Objective]) -> set[str]:
    """Return the names of the settings that none dominates, by their means."""
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
    """Return the settings of which as many runs are done as of any, if any are."""
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


def _summary(name: str, rows: Sequence[TrialRow]) -> SettingSummary:
    done = [asdict(row) for row in rows if row.status == "done"]
    values = {key: [float(row[key]) for row in done] for key in _MEANS}
    return SettingSummary(
        name=name,
        params=rows[0].params,
        num_done=len(done),
        mean={key: statistics.mean(numbers) for key, numbers in values.items() if numbers},
        spread={
            key: statistics.stdev(numbers) for key, numbers in values.items() if len(numbers) > 1
        },
        pareto=False,
    )


def _sort_key(params: Params) -> list[tuple[str, float, str]]:
    """Sort settings by their values, numbers by size."""
    return [
        (name, float(value) if isinstance(value, int | float) else 0.0, str(value))
        for name, value in params.items()
    ]

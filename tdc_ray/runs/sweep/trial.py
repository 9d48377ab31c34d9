"""One trial of a sweep: a whole run, in a process that only leads it, for every seed."""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_ray.config.run import RunConfig
from tdc_ray.errors import TdcError, WorkFailedError
from tdc_ray.execution.cache import ResultCache
from tdc_ray.execution.events import Reported
from tdc_ray.execution.ray.cache_session import CacheSession
from tdc_ray.runs.events import SinksFor, no_sinks
from tdc_ray.runs.results import Results
from tdc_ray.runs.run import run
from tdc_ray.runs.sweep.results import started_row
from tdc_ray.runs.sweep.space import Params, applied
from tdc_ray.storage.files import exists, read_json, remove, write_json
from tdc_ray.storage.logs import log_to
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir

TuneReport = Callable[[dict[str, float]], None]
"""Tells Ray Tune what a trial came to, or how it goes."""

FAILED_FILE = "failed.json"
"""In a run's directory: why it failed, and in which call of the sweep."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """What every trial is told."""

    folder: Path
    config: RunConfig
    store: Path
    seeds: tuple[int, ...]
    stop_early: bool
    session: str
    """Of the call of the sweep."""

    sinks_for: SinksFor = no_sinks


def point_of(config: Mapping[str, Any], seeds: Sequence[int]) -> tuple[Params, Sequence[int]]:
    """Give a trial's setting and seeds: of a grid one is a trial, else all are."""
    if "point" in config:
        return config["point"]["params"], [config["point"]["seed"]]
    return dict(config), seeds


def run_trial(config: Mapping[str, Any], job: TrialSpec, report: TuneReport) -> None:
    """Run a setting in the process of a trial; its work goes to the cluster's actors."""
    logging.getLogger("tdc_ray").setLevel(logging.INFO)
    params, seeds = point_of(config, job.seeds)
    results = [_run(job, params, seed, report) for seed in seeds]
    found: dict[str, Callable[[Results], float]] = {
        "score": lambda one: one.tdc.score,
        "macs": lambda one: one.tdc.macs,
        "train_macs": lambda one: one.tdc.train_macs,
    }
    report({name: statistics.mean(map(of, results)) for name, of in found.items()})


def _run(job: TrialSpec, params: Params, seed: int, report: TuneReport) -> Results:
    row = started_row(params, seed)
    run_dir = RunDir(job.folder / row.run_dir)
    failed = run_dir.root / FAILED_FILE
    told = read_json(failed) if exists(failed) else {}
    if told.get("session") == job.session and told["is_ours"]:
        # Tune begins again whatever failed, but this would fail again.
        raise WorkFailedError({row.name: told["error"]})
    remove(failed)

    def report_loss(event: object) -> None:
        match event:
            case Reported("base", step, {"loss": loss}) if job.stop_early:
                report({"loss": loss, "base_step": step})

    cache = CacheSession(ResultCache(job.store, display_path(run_dir.root)))
    with log_to(run_dir.log), cache, cache.exclusive(row.name):
        try:
            config = applied(job.config, params, seed)
            sinks = [*job.sinks_for(run_dir), report_loss]
            return run(config, run_dir.root, sinks, job.store)
        except Exception as error:
            logger.exception("the run failed")
            is_ours = isinstance(error, TdcError)
            text = str(error) if is_ours else f"{type(error).__name__}: {error}"
            write_json(failed, {"session": job.session, "error": text, "is_ours": is_ours})
            raise


def failure_of(run_dir: Path, session: str) -> str:
    """Say why a run failed."""
    failed = run_dir / FAILED_FILE
    if exists(failed) and read_json(failed)["session"] == session:
        return str(read_json(failed)["error"])
    return f"its process died; see {display_path(run_dir / 'run.log')}"

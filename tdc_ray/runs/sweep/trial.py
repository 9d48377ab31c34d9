"""One trial of a sweep: a whole run for every seed, in a process that only drives it."""

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
from tdc_ray.runs.sweep.results import TRIALS_DIR
from tdc_ray.runs.sweep.space import Params, trial_name, with_params
from tdc_ray.storage.files import exists, read_json, remove, write_json
from tdc_ray.storage.logs import log_to
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir

TuneReport = Callable[[dict[str, float]], None]
"""Reports a trial's results, or its progress, to Ray Tune."""

FAILED_FILE = "failed.json"
"""File in a run's directory: why it failed, and in which call of the sweep."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """What all trials of a sweep have in common."""

    folder: Path
    config: RunConfig
    store: Path
    seeds: tuple[int, ...]
    stop_early: bool
    session: str
    """Random name of the call of the sweep."""

    sinks_for: SinksFor = no_sinks


def point_of(config: Mapping[str, Any], seeds: Sequence[int]) -> tuple[Params, Sequence[int]]:
    """Return a trial's setting and seeds: one seed in a grid, else all."""
    if "point" in config:
        return config["point"]["params"], [config["point"]["seed"]]
    return dict(config), seeds


def run_trial(config: Mapping[str, Any], spec: TrialSpec, report: TuneReport) -> None:
    """Run a setting in the process of a trial; its work runs on the cluster's actors."""
    logging.getLogger("tdc_ray").setLevel(logging.INFO)
    params, seeds = point_of(config, spec.seeds)
    models = [_run(spec, params, seed, report).tdc for seed in seeds]
    report(
        {
            "score": statistics.mean(model.score for model in models),
            "macs": statistics.mean(model.macs for model in models),
            "train_macs": statistics.mean(model.train_macs for model in models),
        }
    )


def _run(spec: TrialSpec, params: Params, seed: int, report: TuneReport) -> Results:
    name = trial_name(params, seed)
    run_dir = RunDir(spec.folder / TRIALS_DIR / name)
    path = run_dir.root / FAILED_FILE
    failure = read_json(path) if exists(path) else {}
    if failure.get("session") == spec.session and failure["is_ours"]:
        # Tune runs a trial again after any failure, but this one would recur.
        raise WorkFailedError({name: failure["error"]})
    remove(path)

    def report_loss(event: object) -> None:
        match event:
            case Reported("base", step, {"loss": loss}) if spec.stop_early:
                report({"loss": loss, "base_step": step})

    cache = CacheSession(ResultCache(spec.store, display_path(run_dir.root)))
    with log_to(run_dir.log), cache, cache.exclusive(name):
        try:
            config = with_params(spec.config, params, seed)
            sinks = [*spec.sinks_for(run_dir), report_loss]
            return run(config, run_dir.root, sinks, spec.store)
        except Exception as error:
            logger.exception("the run failed")
            is_ours = isinstance(error, TdcError)
            text = str(error) if is_ours else f"{type(error).__name__}: {error}"
            write_json(path, {"session": spec.session, "error": text, "is_ours": is_ours})
            raise


def failure_of(run_dir: Path, session: str) -> str:
    """Return why a run failed."""
    path = run_dir / FAILED_FILE
    if exists(path) and read_json(path)["session"] == session:
        return str(read_json(path)["error"])
    return f"its process died; see {display_path(run_dir / 'run.log')}"

"""Sweeps by Ray Tune and Optuna: a trial is a whole run, and what trials share is computed once.

The folder of a sweep holds ``sweep.json``, ``trials/<name>/`` (run directories), ``store/`` (see
``tdc_ray.execution.cache``), ``hparams/`` (TensorBoard's), ``study.log`` (Optuna's) and ``tune/``.
The same call goes on after a cut: runs that are done are not run again, others go on in their
directories.
"""

import functools
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from tdc_ray.config.run import RunConfig, with_absolute_paths
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.errors import ConfigError, TdcError, WorkFailedError
from tdc_ray.execution.events import EventSink, Sinks
from tdc_ray.execution.ray.cache_session import start_claim_registry
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.execution.ray.service import Service, start_service
from tdc_ray.execution.ray.workers import check_capacity
from tdc_ray.pruning.proxies.language_model import LLM_SERVICE
from tdc_ray.pruning.proxies.llm_gateway import LLMGateway
from tdc_ray.runs.events import SinksFor, no_sinks
from tdc_ray.runs.preflight import check
from tdc_ray.runs.pretrained.importer import with_first_stage
from tdc_ray.runs.pretrained.sources import pretrained_base
from tdc_ray.runs.run import local_cpus
from tdc_ray.runs.stages.base_trainer import check_cluster, storage_of
from tdc_ray.runs.sweep.results import (
    SweepResults,
    TrialFinished,
    TrialRow,
    begun,
    ended_row,
    save_sweep,
    started_row,
    summarized,
)
from tdc_ray.runs.sweep.space import (
    Domain,
    Params,
    Range,
    applied,
    check_space,
    grid,
    setting_name,
    trial_name,
)
from tdc_ray.runs.sweep.study import distribution, open_storage, reconcile
from tdc_ray.runs.sweep.trial import TrialSpec, failure_of, point_of, run_trial
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import display_path, resolve_path

STORE_DIR = "store"
TRIAL_BYTES = 128 * 1024**2
"""Memory by which Ray places trials. They take no CPU: it would be missing to their work."""

MAX_FAILURES = 2
"""How often a trial is begun again whose process died."""

TUNE_VARIABLES = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one prints a lot
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run writes its own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends a run
    "TUNE_FORCE_TRIAL_CLEANUP_S": "20",  # of a trial that the scheduler stops
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # losses on the way are no score
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",  # else it warns of each step of its own on a busy machine
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

logger = logging.getLogger(__name__)


def sweep(
    config: RunConfig,
    space: Mapping[str, Domain],
    how: SweepConfig,
    folder: Path,
    points: Sequence[Params] | None = None,
    store: Path | None = None,
    sinks: Sequence[EventSink] = (),
    sinks_for: SinksFor = no_sinks,
) -> SweepResults:
    """Search settings, or go on, and give what came out, which ``sweep.json`` holds too.

    Args:
        config: The settings that the fields are varied of.
        space: What is varied, by dotted names.
        how: How.
        folder: The sweep's folder, or its URI.
        points: Settings of a grid, where not every combination is meant.
        store: What its trials share, with other runs too; None: a folder in the sweep's.
        sinks: What takes the sweep's events: `TrialFinished`.
        sinks_for: Makes what takes a trial's, in the trial's process.

    Raises:
        TdcError: What cannot work, before any work where that can be known.
        WorkFailedError: Trials failed; the others are finished and kept.
    """
    folder = resolve_path(folder).resolve()
    store = folder / STORE_DIR if store is None else resolve_path(store).resolve()
    config = with_absolute_paths(config)
    config = with_first_stage(config, pretrained_base(config.model))
    check_space(space, config, how, points)
    points = grid(space) if points is None and how.search == "grid" else points
    _check_trials(config, space, how, points)
    for name, value in TUNE_VARIABLES.items():
        os.environ.setdefault(name, value)
    with hold_lease(folder), connected(local_cpus(config.compute), dashboard=True):
        check_cluster(config.compute)
        check_capacity(config.compute)
        rows = begun(folder, config, space, how)
        table = _Table(folder, store, config, rows, Sinks(sinks), sinks_for)
        asks = "llm" in (config.prune.method, *_values(space.get("prune.method")))
        shared = [start_claim_registry(store)]  # lives as long as this
        if asks:
            gateway = Service(
                partial(LLMGateway, config.proxy, folder), config.proxy.max_concurrent
            )
            shared.append(start_service(LLM_SERVICE, gateway))
        if points is None:
            _run_study(table, space, how)
        else:
            _run_grid(table, points, how)
    failed = {row.name: str(row.error) for row in table.rows.values() if row.status == "failed"}
    if failed:
        raise WorkFailedError(failed)
    return table.results


def _check_trials(
    config: RunConfig,
    space: Mapping[str, Domain],
    how: SweepConfig,
    points: Sequence[Params] | None,
) -> None:
    """Check every setting of a grid, and the ends of what others draw from."""
    base_of = functools.cache(pretrained_base)  # its checkpoint is mapped once for all trials
    ends = [{name: value} for name, domain in space.items() for value in _values(domain)]
    for params in ends if points is None else points:
        try:
            one = applied(config, params, how.seeds[0])
            if one != with_absolute_paths(one):  # trials have working directories of their own
                raise ConfigError("paths that are varied must be absolute.")
            check(one, base_of(one.model))
        except TdcError as error:
            raise type(error)(f"{setting_name(params)}: {error}") from error


def _values(domain: Domain | None) -> tuple[Any, ...]:
    """Give a domain's values, or its ends."""
    if isinstance(domain, Range):
        return tuple(int(end) if domain.whole else end for end in (domain.low, domain.high))
    return () if domain is None else domain.values


class _Table(tune.Callback):
    """The rows of a sweep: written whenever a trial begins or ends."""

    def __init__(
        self,
        folder: Path,
        store: Path,
        config: RunConfig,
        results: SweepResults,
        events: EventSink,
        sinks_for: SinksFor,
    ) -> None:
        self.folder, self.store, self.config, self.results = folder, store, config, results
        self.events, self.sinks_for = events, sinks_for
        self.session = secrets.token_hex(8)
        self.rows = {row.name: row for row in results.rows}
        for row in self.rows.values():  # the driver may have died before it wrote of its end
            self._take(ended_row(row, folder, row.status, row.error))
        self.write()

    def points_left(self, params: Params, seeds: Sequence[int]) -> list[int]:
        """Give the seeds with which a setting is still to be run."""
        rows = {seed: self.rows.get(trial_name(params, seed)) for seed in seeds}
        over = ("done", "stopped")
        return [seed for seed, row in rows.items() if row is None or row.status not in over]

    def write(self) -> None:
        """Bring ``sweep.json`` up to date."""
        self.results = summarized(self.results, list(self.rows.values()))
        save_sweep(self.folder, self.results)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Begin the rows of a trial."""
        del iteration, trials, info
        params, seeds = point_of(trial.config, self.results.seeds)
        for seed in self.points_left(params, seeds):
            row = started_row(params, seed)
            self.rows[row.name] = row
            logger.info(
                "%s begins; its log: %s", row.name, display_path(self.folder / row.run_dir)
            )
        self.write()

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        """Complete the rows of a trial that ended, or that the scheduler stopped."""
        del iteration, trials, info
        self._end(trial, "stopped", "its base learnt worse than others'")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note why a trial failed."""
        del iteration, trials, info
        self._end(trial, "failed", None)

    def _end(self, trial: Any, status: Any, reason: str | None) -> None:
        params, seeds = point_of(trial.config, self.results.seeds)
        for seed in seeds:
            row = started_row(params, seed)
            error = reason or failure_of(self.folder / row.run_dir, self.session)
            row = ended_row(row, self.folder, status, error)
            self._take(row)
            told = f"{row.metric} {row.score:.4g}" if row.score is not None else row.error
            logger.info("%s %s: %s", row.name, row.status, told)
        self.write()

    def _take(self, row: TrialRow) -> None:
        self.rows[row.name] = row
        if row.status == "done":
            self.events(TrialFinished(self.config, row))


def _run_grid(table: _Table, points: Sequence[Params], how: SweepConfig) -> None:
    """Run all settings, seed by seed: of different seeds, trials side by side share little."""
    left = [
        {"params": dict(params), "seed": seed}
        for params in points
        for seed in how.seeds
        if table.points_left(params, [seed])
    ]
    if left:
        _fit(table, how, {"point": tune.grid_search(left)}, num_samples=1)


def _run_study(table: _Table, space: Mapping[str, Domain], how: SweepConfig) -> None:
    """Let Optuna choose; settings that were cut or failed come first again."""
    settings = {row.setting: row.params for row in table.rows.values()}
    cut = [params for params in settings.values() if table.points_left(params, how.seeds)]
    left = how.num_trials - (len(settings) - len(cut))
    if left <= 0:
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(table.folder, how)
    distributions = {name: distribution(domain) for name, domain in space.items()}
    study = optuna.create_study(
        storage=storage,
        study_name=display_path(table.folder),
        directions=["minimize"] * len(how.objectives),
        load_if_exists=True,
    )
    waiting = reconcile(study, table.results, distributions, how)
    seed = how.search_seed + len(study.trials)  # one that goes on draws others
    sampler: Any = (
        optuna.samplers.RandomSampler(seed=seed)
        if how.search == "random"
        else optuna.samplers.TPESampler(seed=seed)
    )
    search = OptunaSearch(
        distributions,
        metric=list(how.objectives),
        mode=["min"] * len(how.objectives),
        points_to_evaluate=[dict(params) for params in cut if dict(params) not in waiting],
        sampler=sampler,
        study_name=study.study_name,
        storage=storage,
    )
    _fit(table, how, {}, num_samples=left, search=search)


def _fit(
    table: _Table,
    how: SweepConfig,
    param_space: dict[str, Any],
    *,
    num_samples: int,
    search: OptunaSearch | None = None,
) -> None:
    """Let Ray Tune run the trials."""
    stop_early = how.stop_early
    job = TrialSpec(
        table.folder,
        table.config,
        table.store,
        how.seeds,
        stop_early,
        table.session,
        table.sinks_for,
    )

    def trial(config: dict[str, Any]) -> None:
        run_trial(config, job, tune.report)

    bundles = tune.PlacementGroupFactory([{"memory": float(TRIAL_BYTES)}])
    steps = table.config.base.num_steps
    scheduler = ASHAScheduler(
        time_attr="base_step",
        metric="loss",
        mode="min",
        max_t=max(1, steps),
        grace_period=max(1, steps // 10),
        reduction_factor=3,
        stop_last_trials=False,
    )
    tune.Tuner(
        tune.with_resources(trial, bundles),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler if stop_early else None,
            num_samples=num_samples,
            max_concurrent_trials=how.max_concurrent,
        ),
        run_config=tune.RunConfig(
            name="tune",
            **storage_of(table.folder),
            callbacks=[table, JsonLoggerCallback()],  # type: ignore[no-untyped-call]
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    ).fit()

"""Sweeps by Ray Tune and Optuna: a trial is a whole run; what trials share is computed once.

The folder of a sweep holds ``sweep.json``, ``trials/<name>/`` (run directories), ``store/`` (see
``execution.cache``), ``hparams/`` (TensorBoard's), ``study.log`` (Optuna's) and ``tune/``. The
same call resumes an interrupted sweep: finished runs are not run again, others resume in their
directories.
"""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from tdc_ray.config.run import RunConfig, recorded_settings, with_absolute_paths
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.data.load import with_commit
from tdc_ray.errors import ConfigError, TdcError, WorkFailedError
from tdc_ray.execution.events import EventSink, listening
from tdc_ray.execution.ray.cache_session import start_claim_registry
from tdc_ray.execution.ray.cluster import connected, with_gpus
from tdc_ray.execution.ray.service import Service, start_service
from tdc_ray.execution.ray.workers import check_capacity
from tdc_ray.models.config_file import with_file
from tdc_ray.pruning.proxies.language_model import LLM_SERVICE
from tdc_ray.pruning.proxies.llm_gateway import LLMGateway
from tdc_ray.runs.choices import with_choices, with_pretrained
from tdc_ray.runs.events import SinksFor, no_sinks
from tdc_ray.runs.preflight import check
from tdc_ray.runs.pretrained.importer import with_first_stage
from tdc_ray.runs.pretrained.notes import base_notes
from tdc_ray.runs.pretrained.sources import resolve_base
from tdc_ray.runs.run import local_cpus
from tdc_ray.runs.stages.base_samples import with_base_samples
from tdc_ray.runs.stages.base_trainer import check_cluster, storage_of
from tdc_ray.runs.sweep.results import CONFIG_FILE, SweepResults, open_results
from tdc_ray.runs.sweep.space import Domain, Params, check_space, grid, setting_name, with_params
from tdc_ray.runs.sweep.study import distribution, open_storage, reconcile
from tdc_ray.runs.sweep.table import SweepTable
from tdc_ray.runs.sweep.ticker import Ticker
from tdc_ray.runs.sweep.trial import TrialSpec, point_of, run_trial
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import display_path, resolve_path

logger = logging.getLogger(__name__)

STORE_DIR = "store"
TRIAL_BYTES = 128 * 1024**2
"""Memory by which Ray places trials. They use no CPU: their own work would lack it."""

MAX_FAILURES = 2
"""Most restarts of a trial whose process died."""

TUNE_VARIABLES = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one prints a lot
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run writes its own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends a run
    "TUNE_FORCE_TRIAL_CLEANUP_S": "20",  # of a trial that the scheduler stops
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a loss comes without a score
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",  # else each of its steps warns on a busy machine
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def sweep(
    config: RunConfig,
    space: Mapping[str, Domain],
    sweep_config: SweepConfig,
    folder: Path,
    points: Sequence[Params] | None = None,
    store: Path | None = None,
    sinks: Sequence[EventSink] = (),
    sinks_for: SinksFor = no_sinks,
) -> SweepResults:
    """Search settings, or resume a search; return the content of ``sweep.json``.

    Args:
        config: The settings of which some are varied.
        space: What is varied, by dotted names.
        sweep_config: How settings are searched.
        folder: The sweep's folder, or its URI.
        points: Settings of a grid, if not all combinations.
        store: The cache that trials share, also with other runs. None means a folder in the
            sweep's.
        sinks: Called with the sweep's events: ``TrialFinished`` and ``SweepProgress``.
        sinks_for: Creates the sinks of a trial's events, in the trial's process.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
        WorkFailedError: Trials failed; the others are finished and kept.
    """
    folder = resolve_path(folder).resolve()
    store = folder / STORE_DIR if store is None else resolve_path(store).resolve()
    if points is None and sweep_config.search == "grid":
        points = grid(space)
    num_settings = sweep_config.num_trials if points is None else len(points)
    for name, value in TUNE_VARIABLES.items():
        os.environ.setdefault(name, value)
    with (
        listening(sinks) as events,
        Ticker(events, num_settings * len(sweep_config.seeds)) as ticker,
    ):
        config = _checked(config, space, sweep_config, points, folder / CONFIG_FILE)
        with hold_lease(folder), connected(local_cpus(config.compute), dashboard=True):
            compute = with_gpus(config.compute)
            check_cluster(compute)
            check_capacity(compute)
            results = open_results(folder, config, space, sweep_config)
            table = ticker.table = SweepTable(folder, config, results, events)
            spec = TrialSpec(
                folder=folder,
                config=config,
                store=store,
                seeds=sweep_config.seeds,
                stop_early=sweep_config.stop_early,
                session=table.session,
                sinks_for=sinks_for,
            )
            # Trials find them by name, while this list lives.
            actors = [start_claim_registry(store)]
            varied = space.get("prune.method")
            if "llm" in (config.prune.method, *(varied.values if varied else ())):
                gateway = partial(LLMGateway, config.proxy, folder)
                actors.append(
                    start_service(LLM_SERVICE, Service(gateway, config.proxy.max_concurrent))
                )
            if points is None:
                _run_study(spec, table, space, sweep_config)
            else:
                _run_grid(spec, table, points, sweep_config)
    failed = {row.name: str(row.error) for row in table.rows.values() if row.status == "failed"}
    if failed:
        raise WorkFailedError(failed)
    return table.results


def _checked(
    config: RunConfig,
    space: Mapping[str, Domain],
    sweep_config: SweepConfig,
    points: Sequence[Params] | None,
    recorded: Path,
) -> RunConfig:
    """Complete the settings by what base and data bring, and check every trial's.

    Args:
        config: The settings of which some are varied.
        space: What is varied.
        sweep_config: How settings are searched.
        points: Settings of a grid. None means that they are drawn.
        recorded: File of the settings that an earlier call recorded.

    Raises:
        TdcError: A run could not work.
    """
    config, pretrained = with_pretrained(with_absolute_paths(config), recorded)
    config = with_first_stage(config, pretrained)
    before = recorded_settings(recorded)
    config = replace(
        config, data=with_commit(config.data, None if before is None else before.data.path)
    )
    if not any(name.startswith("model.") for name in space):
        config = replace(config, model=with_file(config.model))  # once for all trials
    check_space(space, config, sweep_config, points)
    _check_trials(config, space, sweep_config.seeds[0], points)
    if pretrained is not None:
        for note in base_notes(pretrained, config.diffusion, config.sampler):
            logger.warning("%s", note)
    return config


def _check_trials(
    config: RunConfig, space: Mapping[str, Domain], seed: int, points: Sequence[Params] | None
) -> None:
    """Check every setting of a grid, or the bounds that settings are drawn between.

    Raises:
        TdcError: A run could not work.
    """
    base_of = functools.cache(resolve_base)  # its checkpoint is mapped once for all trials
    bounds = [{name: value} for name, domain in space.items() for value in domain.values]
    for params in bounds if points is None else points:
        try:
            trial_config = with_params(config, params, seed)
            if trial_config != with_absolute_paths(trial_config):
                # Trials have working directories of their own.
                raise ConfigError("paths that are varied must be absolute.")
            source = trial_config.model.base
            base = None if source is None else base_of(source)
            check(with_choices(with_base_samples(trial_config, base)), base)
        except TdcError as error:
            raise type(error)(f"{setting_name(params)}: {error}") from error


class _Callback(tune.Callback):
    """Updates the rows of a sweep from Tune's trials."""

    def __init__(self, table: SweepTable) -> None:
        self._table = table

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Begin the rows of a trial."""
        del iteration, trials, info
        self._table.start(*point_of(trial.config, self._table.results.seeds))

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        """Complete the rows of a trial that ended, or that the scheduler stopped."""
        del iteration, trials, info
        point = point_of(trial.config, self._table.results.seeds)
        self._table.end(*point, "stopped", "its base learnt worse than others'")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note why a trial failed."""
        del iteration, trials, info
        self._table.end(*point_of(trial.config, self._table.results.seeds), "failed")


def _run_grid(
    spec: TrialSpec, table: SweepTable, points: Sequence[Params], sweep_config: SweepConfig
) -> None:
    """Run all settings, seed by seed: trials of different seeds share little."""
    remaining = [
        {"params": dict(params), "seed": seed}
        for params in points
        for seed in spec.seeds
        if table.remaining_seeds(params, [seed])
    ]
    if remaining:
        param_space = {"point": tune.grid_search(remaining)}
        _fit(spec, table, param_space, num_samples=1, max_concurrent=sweep_config.max_concurrent)


def _run_study(
    spec: TrialSpec, table: SweepTable, space: Mapping[str, Domain], sweep_config: SweepConfig
) -> None:
    """Let Optuna choose; settings that were interrupted or failed come first again."""
    settings = {row.setting: row.params for row in table.rows.values()}
    again = [params for params in settings.values() if table.remaining_seeds(params, spec.seeds)]
    num_remaining = sweep_config.num_trials - (len(settings) - len(again))
    if num_remaining <= 0:
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(spec.folder, sweep_config.study)
    distributions = {name: distribution(domain) for name, domain in space.items()}
    objectives: list[str] = list(sweep_config.objectives)
    study = optuna.create_study(
        storage=storage,
        study_name=display_path(spec.folder),
        directions=["minimize"] * len(objectives),
        load_if_exists=True,
    )
    waiting = reconcile(study, table.results, distributions)
    seed = sweep_config.search_seed + len(study.trials)  # a resumed search draws other settings
    sampler: Any = (
        optuna.samplers.RandomSampler(seed=seed)
        if sweep_config.search == "random"
        else optuna.samplers.TPESampler(seed=seed)
    )
    search = OptunaSearch(
        distributions,
        metric=objectives,
        mode=["min"] * len(objectives),
        points_to_evaluate=[dict(params) for params in again if dict(params) not in waiting],
        sampler=sampler,
        study_name=study.study_name,
        storage=storage,
    )
    _fit(
        spec,
        table,
        {},
        num_samples=num_remaining,
        max_concurrent=sweep_config.max_concurrent,
        search=search,
    )


def _fit(
    spec: TrialSpec,
    table: SweepTable,
    param_space: dict[str, Any],
    *,
    num_samples: int,
    max_concurrent: int,
    search: OptunaSearch | None = None,
) -> None:
    """Let Ray Tune run the trials."""

    def trial(config: dict[str, Any]) -> None:
        run_trial(config, spec, tune.report)

    bundles = tune.PlacementGroupFactory([{"memory": float(TRIAL_BYTES)}])
    steps = spec.config.base.num_steps
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
            scheduler=scheduler if spec.stop_early else None,
            num_samples=num_samples,
            max_concurrent_trials=max_concurrent,
        ),
        run_config=tune.RunConfig(
            name="tune",
            **storage_of(spec.folder),
            callbacks=[_Callback(table), JsonLoggerCallback()],  # type: ignore[no-untyped-call]
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    ).fit()

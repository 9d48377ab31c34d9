"""Optuna's study of a sweep: its storage, and its update from the sweep's results."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.runs.sweep.results import SweepResults
from tdc_ray.runs.sweep.space import Choices, Domain
from tdc_ray.storage.files import cut_at_torn_line
from tdc_ray.storage.object_store import is_remote

STUDY_VARIABLE = "TDC_RAY_STUDY"
"""Environment variable: the database URL of Optuna's study, where no setting gives one."""

STUDY_FILE = "study.log"

_MALFORMED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
"""What comes of lines that are no operations of Optuna's, as they are replayed and read."""


def reconcile(
    study: optuna.Study, results: SweepResults, distributions: Mapping[str, BaseDistribution]
) -> list[dict[str, Any]]:
    """Update a study by a sweep's results; return the settings that wait in it.

    Trials that were running when a driver died have failed. Settings that are done and missing, as
    after a loss of the study's file, are added.

    Raises:
        StorageError: The study holds something else than trials.
    """
    running, waiting, known = list[int](), list[dict[str, Any]](), list[dict[str, Any]]()
    try:
        for trial in study.trials:
            if trial.state is TrialState.RUNNING:
                running.append(trial.number)
            if trial.state is TrialState.WAITING:
                waiting.append(dict(trial.system_attrs.get("fixed_params", {})))
            if trial.state is TrialState.COMPLETE:
                known.append(trial.params)
    except _MALFORMED as error:
        in_file = isinstance(study._storage, JournalStorage)
        name = f"the study {study.study_name}"
        raise StorageError(_no_study(name, error, in_file=in_file)) from error
    for number in running:
        study.tell(number, state=TrialState.FAIL)
    for setting in results.settings:
        if dict(setting.params) not in known and setting.num_done == len(results.seeds):
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(setting.params),
                    distributions=dict(distributions),
                    values=[setting.mean[name] for name in results.objectives],
                )
            )
    return waiting


def distribution(domain: Domain) -> BaseDistribution:
    """Return a domain as Optuna's distribution."""
    if isinstance(domain, Choices):
        return CategoricalDistribution(domain.values)
    if domain.whole:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def _no_study(name: str, error: Exception, *, in_file: bool = True) -> str:
    remedy = f"Remove {STUDY_FILE} from the sweep's folder, or name" if in_file else "Name"
    return (
        f"{name} holds something else than Optuna's trials ({type(error).__name__}: {error}). "
        f"{remedy} another database: the sweep goes on with what sweep.json holds."
    )


class _Database(RDBStorage):
    """A database whose URL, which may hold a password, Tune does not write into its files."""

    def __getstate__(self) -> dict[Any, Any]:
        return {**super().__getstate__(), "url": "sqlite://"}


def open_storage(folder: Path, url: str | None) -> BaseStorage:
    """Open the storage of Optuna's study.

    Args:
        folder: The sweep's folder.
        url: URL of a database. None means the environment's, or a file in the folder.

    Raises:
        ConfigError: The database cannot be opened.
        StorageError: The file in the folder holds something else than a study.
    """
    url = url or os.environ.get(STUDY_VARIABLE)
    if url is None:
        if is_remote(folder):  # what sweep.json knows is added anew
            return optuna.storages.InMemoryStorage()
        path = folder / STUDY_FILE
        cut_at_torn_line(path)  # what sweep.json knows is added anew
        try:
            return JournalStorage(JournalFileBackend(str(path)))
        except (*_MALFORMED, optuna.exceptions.OptunaError) as error:
            raise StorageError(_no_study(str(path), error)) from error
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        without_password = make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        raise ConfigError(
            "sweep.study must be a database URL, such as postgresql://host/db."
        ) from None
    try:
        return _Database(url)
    except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
        raise ConfigError(
            f"sweep.study {without_password} cannot be opened ({type(error).__name__}): is the "
            "address right, and the database's driver installed?"
        ) from None

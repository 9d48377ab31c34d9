"""Reads what a report is about: runs and sweeps, finished or not, from their directories alone."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AliasChoices, Field, TypeAdapter, ValidationError

from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.layout import RunDir
from tdc_ray.plan import Plan
from tdc_ray.prune.memory import MemoryBank, MemoryEntry
from tdc_ray.remote import shown
from tdc_ray.results import Results, load_results
from tdc_ray.status import Status, status
from tdc_ray.storage import exists, fetch, listing, read_json
from tdc_ray.timeline import History, Usage, load_history, usage

SWEEP_FILE = "sweep.json"

Setting = str | int | float | bool | None
"""Of a trial."""

Pixels = npt.NDArray[np.uint8]
"""Images of shape ``(N, H, W, C)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a run left."""

    name: str
    """Short, and no other run's of the report."""

    path: str
    preset: str
    seed: int
    results: Results | None
    """None: the run is not finished."""

    progress: Status | None
    """How far it is, if it is not finished."""

    plan: Plan | None
    memory: Sequence[MemoryEntry]
    history: History
    usage: Sequence[Usage]
    samples: Mapping[str, Pixels]
    """The first images that were scored, of ``base`` and ``tdc``, from the same noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial, as ``sweep.json`` tells of it; what it has not is None."""

    name: str
    params: Mapping[str, Setting]
    """The settings that vary, by their dotted names."""

    status: str
    setting: str | None = None
    """Name of its settings, of which there is a trial for every seed."""

    seed: int | None = None
    run_dir: str | None = None
    """Relative to the sweep's folder."""

    error: str | None = None
    score: float | None = None
    metric: str | None = None
    macs: float | None = None
    num_params: float | None = None
    train_macs: float | None = None
    """Of base and experts, as if it stood alone."""

    reused_train_macs: float | None = None
    """What of that had been computed for other trials."""

    search_macs: float | None = None
    seconds: float | None = None
    """Of the attempt that finished it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """``sweep.json``; fields that are not named here are passed over."""

    format: Literal[1]
    trials: Annotated[tuple[Trial, ...], Field(validation_alias=AliasChoices("rows", "trials"))]
    labels: Mapping[str, str] = field(default_factory=dict)
    """Short names of settings."""

    pareto: tuple[str, ...] = ()
    """Names of the trials, or of their settings, that no other is better than in all
    objectives."""

    def is_best(self, trial: Trial) -> bool:
        """Whether a trial, or its setting, is on the Pareto front."""
        return bool({trial.name, trial.setting} & set(self.pareto))


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepData:
    """A sweep, and what its finished trials came to."""

    name: str
    path: str
    sweep: Sweep
    results: Mapping[str, Results]
    """Of the trials whose directories hold any, by name."""

    roots: Mapping[str, Path]
    """Their run directories."""


_SWEEP = TypeAdapter(Sweep)
_PLAN = TypeAdapter(Plan)


def is_sweep(root: Path) -> bool:
    """Whether a folder is a sweep; otherwise it must be a run.

    Raises:
        StorageError: It is neither.
    """
    if exists(root / SWEEP_FILE):
        return True
    run_dir = RunDir(root)
    if exists(run_dir.config) or exists(run_dir.results):
        return False
    raise StorageError(
        f"{shown(root)} is neither a run directory nor a sweep: it has no {run_dir.config.name} "
        f"and no {SWEEP_FILE}. Name the folder that tdc-ray run or tdc-ray sweep wrote into."
    )


def load_run(root: Path, name: str) -> RunData:
    """Read everything of a run that a report shows.

    Raises:
        StorageError: A file of it is damaged.
    """
    run_dir = RunDir(root)
    results = _results(run_dir.results)
    history = _history(run_dir.timeline)
    progress = None
    if results is None:
        try:
            progress = status(run_dir)
        except ConfigError as error:
            raise StorageError(f"{shown(run_dir.config)} holds no settings: {error}") from error
        except (KeyError, TypeError) as error:
            raise StorageError(f"{shown(root)} holds a damaged result: {error!r}.") from error
    about = progress.config if results is None and progress is not None else results
    assert about is not None
    return RunData(
        name=name,
        path=shown(root),
        preset=about.preset,
        seed=about.seed,
        results=results,
        progress=progress,
        plan=_plan(run_dir.plan) if exists(run_dir.plan) else None,
        memory=MemoryBank(run_dir.memory).all(),
        history=history,
        usage=usage(history),
        samples={
            which: _images(shards[0])
            for which in ("base", "tdc")
            if (shards := listing(run_dir.samples / which, "*[0-9].npz"))
        },
    )


def load_sweep(root: Path, name: str) -> SweepData:
    """Read a sweep and the results of its trials.

    Raises:
        StorageError: A file of it is damaged.
    """
    path = root / SWEEP_FILE
    try:
        sweep = _SWEEP.validate_python(read_json(path))
    except ValidationError as error:
        raise StorageError(f"{shown(path)} is no sweep of format 1: {error}") from error
    roots = {
        trial.name: root / _below(trial, path)
        for trial in sweep.trials
        if trial.run_dir is not None
    }
    found = {
        trial: results
        for trial, folder in roots.items()
        if (results := _results(RunDir(folder).results)) is not None
    }
    return SweepData(name=name, path=shown(root), sweep=sweep, results=found, roots=roots)


def _below(trial: Trial, path: Path) -> PurePosixPath:
    """Give a trial's directory, which must lie in the sweep's folder."""
    place = PurePosixPath(trial.run_dir or "")
    if place.is_absolute() or ".." in place.parts:
        raise StorageError(
            f"{shown(path)}: run_dir of trial {trial.name} must lie below the sweep's folder, "
            f"got {place}."
        )
    return place


def _results(path: Path) -> Results | None:
    """Read results, if there are any; what they are divided by must not be 0."""
    if not exists(path):
        return None
    results = load_results(path)
    names = ("macs", "num_params", "train_macs" if results.given_base is None else "macs")
    for name in names:
        if not getattr(results.base, name) > 0:
            raise StorageError(
                f"{shown(path)}: base.{name} must be above 0, got {getattr(results.base, name)}."
            )
    return results


def _plan(path: Path) -> Plan:
    try:
        return _PLAN.validate_python(read_json(path), extra="forbid")
    except ValidationError as error:
        raise StorageError(f"{shown(path)} is no plan: {error}") from error


def _history(path: Path) -> History:
    try:
        return load_history(path)
    except (KeyError, TypeError) as error:
        raise StorageError(f"{shown(path)} holds what is no event: {error!r}.") from error


def _images(path: Path) -> Pixels:
    try:
        with np.load(fetch(path), allow_pickle=False) as file:
            images = file["arr_0"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StorageError(f"{shown(path)} is no npz file of images: {error}.") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise StorageError(
            f"{shown(path)} must hold uint8 images of shape (N, H, W, 1 or 3), got "
            f"{images.dtype} of shape {images.shape}."
        )
    return np.asarray(images)

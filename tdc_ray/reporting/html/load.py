"""Loads the runs and sweeps of a report, finished or not, from their directories alone."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from tdc_ray.diffusion.plan import Plan
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.execution.timeline import History, WorkerUsage, load_history, usage
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.runs.results import Results, load_results
from tdc_ray.runs.status import RunStatus, status
from tdc_ray.runs.sweep import results as sweep_results
from tdc_ray.runs.sweep.results import SWEEP_FILE, SweepResults, TrialRow
from tdc_ray.storage.files import exists, fetch, listing, read_json
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir

Pixels = npt.NDArray[np.uint8]
"""Images of shape ``(N, H, W, C)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """The files of a run that a report shows."""

    name: str
    """Short, and unique in the report."""

    path: str
    preset: str
    seed: int
    results: Results | None
    """None means that the run is not finished."""

    progress: RunStatus | None
    """Its progress, if it is not finished."""

    plan: Plan | None
    memory: Sequence[MemoryEntry]
    history: History
    usage: Sequence[WorkerUsage]
    samples: Mapping[str, Pixels]
    """The first images that were scored, of ``base``, ``longer-base`` and ``tdc``, from the same
    noise."""

    real: Pixels | None
    """Some of the training images; None of runs of older versions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepData:
    """A sweep, and the results of its finished trials."""

    name: str
    path: str
    sweep: SweepResults
    results: Mapping[str, Results]
    """Results of the trials that have any, by name."""

    roots: Mapping[str, Path]
    """Their run directories."""

    def is_best(self, row: TrialRow) -> bool:
        """Whether a trial's setting is on the Pareto front."""
        return row.setting in self.sweep.pareto


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
        f"{display_path(root)} is neither a run directory nor a sweep: it has no "
        f"{run_dir.config.name} and no {SWEEP_FILE}. Name the folder that tdc-ray run or tdc-ray "
        "sweep wrote into."
    )


def load_run(root: Path, name: str) -> RunData:
    """Load everything of a run that a report shows.

    Raises:
        StorageError: A file of it is damaged.
    """
    run_dir = RunDir(root)
    results = _results(run_dir.results)
    history = load_history(run_dir.timeline)
    progress = plan = None
    if results is None:
        with (
            _damage(root, "holds a damaged result", KeyError, TypeError),
            _damage(run_dir.config, "holds no settings", ConfigError),
        ):
            progress = status(run_dir)
    if exists(run_dir.plan):
        with _damage(run_dir.plan, "is no plan", ValidationError):
            plan = _PLAN.validate_python(read_json(run_dir.plan), extra="forbid")
    about = progress.config if results is None and progress is not None else results
    assert about is not None
    return RunData(
        name=name,
        path=display_path(root),
        preset=about.preset,
        seed=about.seed,
        results=results,
        progress=progress,
        plan=plan,
        memory=MemoryBank(run_dir.memory).all(),
        history=history,
        usage=usage(history),
        samples={
            which: _images(shards[0])
            for which in ("base", "longer-base", "tdc")
            if (shards := listing(run_dir.samples / which, "*[0-9].npz"))
        },
        real=_images(run_dir.real_images) if exists(run_dir.real_images) else None,
    )


def load_sweep(root: Path, name: str) -> SweepData:
    """Load a sweep and the results of its trials.

    Raises:
        StorageError: A file of it is damaged.
    """
    sweep = sweep_results.load_sweep(root)
    roots = {row.name: root / _below(row, root / SWEEP_FILE) for row in sweep.rows}
    results_of = {
        trial: results
        for trial, folder in roots.items()
        if (results := _results(RunDir(folder).results)) is not None
    }
    return SweepData(
        name=name, path=display_path(root), sweep=sweep, results=results_of, roots=roots
    )


def _below(row: TrialRow, path: Path) -> PurePosixPath:
    """Return a trial's directory, which must lie in the sweep's folder."""
    run_dir = PurePosixPath(row.run_dir)
    if run_dir.is_absolute() or ".." in run_dir.parts:
        raise StorageError(
            f"{display_path(path)}: run_dir of trial {row.name} must lie below the sweep's "
            f"folder, got {run_dir}."
        )
    return run_dir


def _results(path: Path) -> Results | None:
    """Load results, if there are any; divisors in them must not be 0."""
    if not exists(path):
        return None
    results = load_results(path)
    trained = ["train_macs"] if results.given_base is None else []
    for name in ("macs", "num_params", *trained):
        if not getattr(results.base, name) > 0:
            raise StorageError(
                f"{display_path(path)}: base.{name} must be above 0, got "
                f"{getattr(results.base, name)}."
            )
    return results


@contextmanager
def _damage(path: Path, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise the errors of a damaged file as one that names it."""
    try:
        yield
    except errors as error:
        text = error if isinstance(error, ConfigError | ValidationError) else repr(error)
        raise StorageError(f"{display_path(path)} {what}: {text}") from error


def _images(path: Path) -> Pixels:
    damages = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with _damage(path, "is no npz file of images", *damages), np.load(fetch(path)) as file:
        images = file["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise StorageError(
            f"{display_path(path)} must hold uint8 images of shape (N, H, W, 1 or 3), got "
            f"{images.dtype} of shape {images.shape}."
        )
    return np.asarray(images)

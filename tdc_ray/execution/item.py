"""Work items: the pieces of a run. An item runs in any process and writes its result to a file.

A *chain* is a generator that yields items, is sent their results, and yields the next ones: the
stages of one group, in order. A chain does not know who runs its items (a pool of Ray actors, or
the calling process).
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.errors import StorageError
from tdc_ray.storage.files import exists, read_json, write_json
from tdc_ray.storage.object_store import display_path

Job = TypeVar("Job")
R = TypeVar("R")
"""Type of a result: a small frozen dataclass of plain values. Anything larger is a file."""

Inputs = Mapping[str, Any]
"""All that a result follows from, as JSON values. Equal inputs give equal results."""

Report = Callable[[Mapping[str, float], int], None]
"""Is called with metrics and the step that they belong to."""

StepMetrics = tuple[int, Mapping[str, float]]
"""A step and its metrics."""


@dataclass(frozen=True, slots=True)
class Resources:
    """CPUs and GPUs that one worker takes of its node."""

    cpus: float
    """CPUs, and so threads where they are a whole number."""

    gpus: float = 0.0
    """GPUs; fractions share one."""


def base_resources(compute: ComputeConfig) -> Resources:
    """Return what a worker of the base takes."""
    return Resources(compute.cpus_per_base_worker, compute.gpus_per_base_worker or 0.0)


def actor_resources(compute: ComputeConfig) -> Resources:
    """Return what an actor that trains takes."""
    return Resources(compute.cpus_per_actor, compute.gpus_per_actor or 0.0)


@dataclass(frozen=True, slots=True)
class WorkItem(Generic[Job, R]):
    """A piece of work that needs nothing but its job and the run directory."""

    key: str
    """Name within the run, such as ``group-03/finetune``; also where its metrics are filed."""

    function: Callable[[Job, Report], R | None]
    """What to call: a module-level function, so that it can be sent by its name. Of several
    workers only the first one need return a result."""

    job: Job
    """A frozen dataclass of paths and small values, handed to the function."""

    result_path: Path
    """Where the result is kept: an item whose result exists is never run again."""

    cost: float
    """Expected macs, in any unit that is the same for all items."""

    cost_behind: float = 0.0
    """Expected macs of what its chain does after it."""

    result_type: type[R] = field(kw_only=True)
    """What a result is checked against when it is read."""

    num_steps: int = 1
    """Steps that it reports, for the progress display."""

    resources: Resources | None = None
    """Resources of each of its workers; None means the pool's default."""

    num_workers: int = 1
    """Workers that run it side by side, data parallel; the first one's result counts."""

    reduce_memory: Callable[[Job], Job | None] | None = None
    """Returns a job that needs about half the memory and has the same result, or None where there
    is no smaller one. A module-level function."""

    inputs: Callable[[Job], Inputs | None] | None = None
    """Returns what the result follows from, so that other runs may load it from a cache (see
    ``tdc_ray.execution.cache``), or None where none may. A module-level function."""

    files: tuple[Path, ...] = ()
    """Files and folders that it writes beside its result."""

    service: str | None = None
    """The pool's service that runs it: it waits for something outside, and so holds no worker.
    None means that workers run it."""

    fallback_result: R | None = None
    """The result of an item whose service died too often; each that names a service has one."""

    def reduced_memory(self) -> Job | None:
        """Return its job with about half the memory, if there is one."""
        return None if self.reduce_memory is None else self.reduce_memory(self.job)


AnyItem = WorkItem[Any, Any]

Runner = Callable[..., Any]
"""Runs an item, or obtains its result in another way; called as :func:`run_item` is."""


@dataclass(frozen=True, slots=True)
class CacheMark:
    """Which entry of a result cache a result is."""

    key: str
    reused: bool
    """Whether another run computed it."""


MARK = "shared"
"""Key of the cache's mark in a result's file."""


@dataclass(frozen=True, slots=True)
class ItemResult(Generic[R]):
    """The content of an item's result file."""

    value: R
    cached: CacheMark | None = None
    """None means that no cache has it."""

    def save(self, path: Path) -> None:
        """Write the value's fields as JSON, and the cache's mark after them."""
        mark = {} if self.cached is None else {MARK: asdict(self.cached)}
        write_json(path, {**to_jsonable_python(self.value), **mark})


def load_result(path: Path, result_type: type[R]) -> ItemResult[R]:
    """Read what :meth:`ItemResult.save` wrote.

    Raises:
        StorageError: The file is missing, or holds something else.
    """
    document = read_json(path)
    try:
        mark = document.pop(MARK, None)
        value = checked_result(document, result_type)
        return ItemResult(value, None if mark is None else CacheMark(**mark))
    except (AttributeError, TypeError, ValidationError) as error:
        raise StorageError(f"{display_path(path)} is no result of this item: {error}") from error


def checked_result(document: Any, result_type: type[R]) -> R:
    """Convert JSON values to a result.

    Raises:
        ValidationError: They do not fit.
    """
    result: R = _adapter(cast("Hashable", result_type)).validate_python(document)
    return result


_adapter = functools.cache(TypeAdapter)


def finished(item: WorkItem[Job, R]) -> ItemResult[R] | None:
    """Load the result of an earlier attempt, if there is one."""
    if not exists(item.result_path):
        return None
    return load_result(item.result_path, item.result_type)


def use_fallback(item: WorkItem[Job, R]) -> R:
    """Save and return an item's fallback: what follows is computed from it, after a resume too."""
    assert item.fallback_result is not None
    ItemResult(item.fallback_result).save(item.result_path)
    return item.fallback_result


def run_item(item: WorkItem[Job, R], report: Report, *, is_first: bool = True) -> R | None:
    """Run an item in this process; its first or only worker saves and returns the result."""
    value = item.function(item.job, report)
    if not is_first:
        return None
    assert value is not None
    ItemResult(value).save(item.result_path)
    return value

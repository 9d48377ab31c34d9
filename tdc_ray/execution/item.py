"""Work items: what a run is cut into. An item runs in any process and leaves its result in a file.

A *chain* is a generator that yields items, is sent their results, and yields the next ones: the
stages of one group, in order. Who runs the items (a pool of Ray actors, or the calling process) is
none of the chain's business.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_ray.storage.files import exists, read_json, write_json

Result = dict[str, Any]
"""What an item gives back: plain JSON values. Anything larger is a file that the result names."""

Inputs = Mapping[str, Any]
"""All that a result follows from: plain JSON values. Equal inputs give equal results."""

Report = Callable[[Mapping[str, float], int], None]
"""Takes metrics and the step that they belong to."""

Reported = tuple[int, Mapping[str, float]]
"""A step and its metrics."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker takes of its node."""

    cpus: float
    """CPUs; whole ones are as many threads."""

    gpus: float = 0.0
    """GPUs; fractions share one."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A piece of work that needs nothing but its job and the run directory."""

    key: str
    """Name within the run, such as ``group-03/finetune``; also where its metrics are filed."""

    function: Callable[[Any, Report], Result]
    """What to call; a module-level function, so that it can be sent by its name."""

    job: Any
    """A frozen dataclass of paths and small values, handed to the function."""

    result_path: Path
    """Where the result is kept: an item whose result exists is never run again."""

    cost: float
    """Expected macs, in any unit that is the same for all items."""

    cost_behind: float = 0.0
    """Expected macs of what its chain does after it."""

    num_steps: int = 1
    """Steps that it reports, for the progress display."""

    resources: Resources | None = None
    """What each of its workers takes; None: what all others take."""

    num_workers: int = 1
    """Workers that run it side by side, data parallel; the first one's result counts."""

    reduce_memory: Callable[[Any], Any] | None = None
    """Makes of its job one that needs about half the memory and comes to the same; gives None
    where there is no smaller one. A module-level function."""

    inputs: Callable[[Any], Inputs | None] | None = None
    """Gives of its job what its result follows from, so that other runs may take it from a store
    (see ``tdc_ray.execution.cache``). A module-level function; None, or what gives None: none
    may."""

    files: tuple[Path, ...] = ()
    """Files and folders that it leaves beside its result."""

    service: str | None = None
    """The pool's service that runs it: it waits for something outside, and so holds no worker.
    None means that workers run it."""

    fallback_result: Result | None = None
    """The result of an item whose service died too often; each that names a service has one."""

    def reduced_memory(self) -> Any | None:
        """Give its job with about half the memory, if there is one."""
        return None if self.reduce_memory is None else self.reduce_memory(self.job)


def finished(item: WorkItem) -> Result | None:
    """Give the result that an earlier attempt left, if there is one."""
    if not exists(item.result_path):
        return None
    result = read_json(item.result_path)
    assert isinstance(result, dict)
    return result


def use_fallback(item: WorkItem) -> Result:
    """Give what a lost call gives, and keep it: what follows was made with it, in a resume too."""
    assert item.fallback_result is not None
    write_json(item.result_path, item.fallback_result)
    return item.fallback_result


def run_item(item: WorkItem, report: Report) -> Result:
    """Run an item in this process and keep its result."""
    result = item.function(item.job, report)
    write_json(item.result_path, result)
    return result


@contextmanager
def unwatched(_: WorkItem) -> Iterator[Report]:
    """Heed nothing that an item reports."""
    yield lambda _metrics, _step: None

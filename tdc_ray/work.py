"""Work items: what a run is cut into. An item runs in any process and leaves its result in a file.

A *chain* is a generator that yields items, is sent their results, and yields the next ones: the
stages of one group, in order. Who runs the items (a pool of Ray actors, or the calling process) is
none of the chain's business.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tdc_ray.storage import read_json, write_json

Result = dict[str, Any]
"""What an item gives back: plain JSON values. Anything larger is a file that the result names."""

Report = Callable[[Mapping[str, float], int], None]
"""Takes metrics and the step that they belong to."""

T = TypeVar("T")


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


Chain = Generator[Sequence[WorkItem], Sequence[Result], T]
"""Yields items that may run side by side, is sent their results in order, and returns a value."""


def finished(item: WorkItem) -> Result | None:
    """Give the result that an earlier attempt left, if there is one."""
    if not item.result_path.exists():
        return None
    result = read_json(item.result_path)
    assert isinstance(result, dict)
    return result


def run_item(item: WorkItem, report: Report) -> Result:
    """Run an item in this process and keep its result."""
    result = item.function(item.job, report)
    write_json(item.result_path, result)
    return result


def run_chain(chain: Chain[T], report: Report = lambda _metrics, _step: None) -> T:
    """Run a chain in this process, one item after the other."""
    results: list[Result] | None = None
    while True:
        try:
            items = chain.send(results)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as stop:
            value: T = stop.value
            return value
        results = []
        for item in items:
            earlier = finished(item)
            results.append(run_item(item, report) if earlier is None else earlier)

"""How well the pool keeps real Ray actors busy, and the scheduler's cost per item.

    python experiments/scheduling.py --json experiments/results/scheduling.json
    python experiments/scheduling.py --smoke

Ten groups of work items that only wait, shaped like those of a run (sensitivities, rounds of
candidates, a fine-tune), on 2, 4 and 8 actors, against the least possible: the larger of all work
side by side and the longest chain. Then ten single items against the exact optimum. Then items
that take no time at all, through Ray and in simulated time.

Hardware and hours: 3 minutes on 2 CPU cores; waiting takes none of them. The paper has no such
table.
"""

import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from output import provenance
from rich.console import Console

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.execution.chain import Chain
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.execution.simulator import Simulation
from tdc_ray.storage.files import write_json

Shape = Sequence[Sequence[float]]
"""Seconds of the items of every stage of a chain."""


@dataclass(frozen=True, kw_only=True)
class SchedulingFlags:
    """What is measured, and where it goes."""

    smoke: bool = False
    """Two workers and short items only."""
    seed: int = 0
    """Of the items' durations."""
    json: Path | None = None
    """Where the figures go."""


def wait(seconds: float, _report: Report) -> dict[str, Any]:
    """Wait as long as an item computes."""
    time.sleep(seconds)
    return {}


def chain(folder: Path, name: str, shape: Shape) -> Chain[None]:
    """Create a chain of items that wait."""
    for number, stage in enumerate(shape):
        behind = sum(max(later) for later in shape[number + 1 :])
        yield [
            WorkItem(
                key=f"{name}/{number}-{place}",
                function=wait,
                job=seconds,
                result_path=folder / f"{name}-{number}-{place}.json",
                cost=seconds,
                cost_behind=behind,
                result_type=dict,
            )
            for place, seconds in enumerate(stage)
        ]


def group_shape(draw: random.Random, unit_s: float) -> Shape:
    """Draw the stages of a group: its limit decides how long all of its items take."""
    size = unit_s * draw.uniform(0.5, 1.0)
    return [[size] * 4, [size] * 2, *[[size] * 3] * 3, [size * draw.uniform(4, 8)]]


def optimum(seconds: Sequence[float], num_workers: int) -> float:
    """Find the shortest makespan of single items, by trying all that could be shorter."""
    order, best = sorted(seconds, reverse=True), sum(seconds)
    loads = [0.0] * num_workers

    def place(number: int) -> None:
        nonlocal best
        if number == len(order):
            best = min(best, max(loads))
            return
        for worker in {load: index for index, load in enumerate(loads)}.values():  # one of equals
            if loads[worker] + order[number] < best:
                loads[worker] += order[number]
                place(number + 1)
                loads[worker] -= order[number]

    place(0)
    return best


def measure(pool: Pool, shapes: Mapping[str, Shape]) -> float:
    """Run chains on a pool; return the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        chains = {name: chain(Path(folder), name, shape) for name, shape in shapes.items()}
        started = time.perf_counter()
        pool.run(chains)
        return time.perf_counter() - started


def least(shapes: Mapping[str, Shape], num_workers: int) -> float:
    """Return the lower bound of any order."""
    work = sum(sum(stage) for shape in shapes.values() for stage in shape)
    longest = max(sum(max(stage) for stage in shape) for shape in shapes.values())
    return max(work / num_workers, longest)


def on_workers(num_workers: int, flags: SchedulingFlags) -> dict[str, Any]:
    """Measure one number of workers."""
    draw, unit_s = random.Random(flags.seed), 0.05 if flags.smoke else 0.5
    groups = {f"group-{i}": group_shape(draw, unit_s) for i in range(10)}
    singles = {f"single-{i}": [[unit_s * draw.uniform(2, 20)]] for i in range(10)}
    nothing = {f"nothing-{i}": [[0.0] * 10] * 5 for i in range(2 if flags.smoke else 20)}
    config = RunConfig(compute=ComputeConfig(num_actors=num_workers))
    with (
        collecting([]) as events,
        Pool(config.compute, events) as pool,
    ):
        measure(pool, {f"warm-{i}": [[1.0]] for i in range(num_workers)})  # actors start
        ratios = {
            "groups": measure(pool, groups) / least(groups, num_workers),
            "ten_items": measure(pool, singles)
            / optimum([shape[0][0] for shape in singles.values()], num_workers),
        }
        seconds = measure(pool, nothing)
    num_items = sum(len(stage) for shape in nothing.values() for stage in shape)
    return ratios | {"milliseconds_per_empty_item": 1000 * seconds / num_items}


def policy_milliseconds(flags: SchedulingFlags) -> float:
    """Time the scheduler alone, on a sweep of 20 groups x 200 trials and 1,000 workers."""
    draw, trials = random.Random(flags.seed), 2 if flags.smoke else 200
    shapes = [group_shape(draw, 1.0) for _ in range(20)]
    nowhere = Path("/nonexistent/tdc-ray-scheduling")
    chains = {
        f"{trial}/{group}": chain(nowhere, str(group), shape)
        for trial in range(trials)
        for group, shape in enumerate(shapes)
    }
    started = time.perf_counter()
    found = Simulation(chains, lambda item: item.cost, num_workers=1000).run()
    return 1000 * (time.perf_counter() - started) / found.num_items


def main(flags: SchedulingFlags) -> None:
    """Measure, print, and write what was measured and where."""
    counts = (2,) if flags.smoke else (2, 4, 8)
    with connected(num_cpus=max(counts)):
        found = {str(count): on_workers(count, flags) for count in counts}
    document = {
        **provenance(),
        "seed": flags.seed,
        "makespan_over_least_by_workers": found,
        "policy_milliseconds_per_item": policy_milliseconds(flags),
    }
    Console().print(document)
    if flags.json is not None:
        write_json(flags.json, document)


if __name__ == "__main__":
    main(tyro.cli(SchedulingFlags, description=__doc__))

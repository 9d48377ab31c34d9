"""Work that experiments/chaos.py disturbs in place of a run: items that mostly wait.

Four chains of ten items go through a pool. An item takes eight steps of half a second, keeps a
checkpoint after each, and asks for 64 MB in each, or for less where these were not to be had. Its
result follows from that of the item before it, whatever was cut in between.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.execution.timeline import Timeline
from tdc_ray.storage.files import exists, read_json, write_json
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.run_dir import RunDir

NUM_CHAINS, NUM_ITEMS, NUM_STEPS = 4, 10, 8
SECONDS_OF_A_STEP = 0.5
MEGABYTES = 64


@dataclass(frozen=True)
class Job:
    """What an item begins with, where it keeps how far it is, and what it asks for."""

    start: int
    checkpoint: Path
    megabytes: int = MEGABYTES


@dataclass(frozen=True)
class Value:
    """What an item ends with."""

    value: int


def work(job: Job, report: Report) -> Value:
    """Take the steps that are left."""
    start = {"step": 0, "value": job.start}
    state = read_json(job.checkpoint) if exists(job.checkpoint) else start
    while state["step"] < NUM_STEPS:
        held = bytearray(job.megabytes * 2**20)
        time.sleep(SECONDS_OF_A_STEP)
        # Knuth's linear congruential generator (MMIX).
        value = (state["value"] * 6364136223846793005 + 1442695040888963407) % 2**64
        state = {"step": state["step"] + 1, "value": value}
        del held
        write_json(job.checkpoint, state)
        report({"value": float(value)}, state["step"])
    return Value(state["value"])


def with_less(job: Job) -> Job | None:
    """Return a job that asks for half the memory, if it asks for any."""
    return replace(job, megabytes=job.megabytes // 2) if job.megabytes else None


def chain(folder: Path, name: str, start: int) -> Chain[int]:
    """Create a chain of items, each of which goes on from the one before."""
    value = start
    for number in range(NUM_ITEMS):
        item = WorkItem(
            key=f"{name}/{number}",
            function=work,
            job=Job(value, folder / f"{name}-{number}-checkpoint.json"),
            result_path=folder / f"{name}-{number}.json",
            cost=1.0,
            cost_behind=float(NUM_ITEMS - 1 - number),
            num_steps=NUM_STEPS,
            reduce_memory=with_less,
            result_type=Value,
        )
        value = (yield from result_of(item)).value
    return value


def main() -> None:
    """Do the work, or the rest of it that an earlier call did not finish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", required=True, help="folder or URI")
    run_dir = RunDir(resolve_path(parser.parse_args().run_dir).resolve())
    chains = {f"chain-{i}": chain(run_dir.root, f"chain-{i}", i) for i in range(NUM_CHAINS)}
    with (
        hold_lease(run_dir.root),
        connected(),
        collecting([]) as events,
        Pool(ComputeConfig(num_actors=2), events, Timeline(run_dir.timeline)) as pool,
    ):
        write_json(run_dir.results, pool.run(chains))


if __name__ == "__main__":
    main()

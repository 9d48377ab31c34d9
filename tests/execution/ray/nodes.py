"""A pool on a cluster whose nodes come and go; prints what happened as JSON.

python -m tests.execution.ray.nodes
"""

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

# Ray reads these when it is imported, and so do the processes that it starts.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.execution.chain import Chain
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.execution.timeline import History, Timeline, load_history


def wait(job: tuple[float, Path], _report: Report) -> dict[str, str]:
    """Do what an item does, without computing; leave a file that says on which node."""
    seconds, folder = job
    (folder / ray.get_runtime_context().get_node_id()).touch()
    time.sleep(seconds)
    return {}


def chain(folder: Path, name: str, seconds: float) -> Chain[None]:
    """One item that waits."""
    yield [
        WorkItem(
            f"{name}/wait",
            wait,
            (seconds, folder),
            folder / f"{name}.json",
            seconds,
            result_type=dict,
        )
    ]


def pooled(
    compute: ComputeConfig, num_chains: int, seconds: float, meanwhile: Callable[[Path], None]
) -> History:
    """Run chains on the cluster while something happens to it; give the timeline."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            collecting([]) as events,
            Pool(compute, events, Timeline(folder / "timeline.jsonl")) as pool,
        ):
            chains = {f"c{i}": chain(folder, f"c{i}", seconds) for i in range(num_chains)}
            thread = threading.Thread(target=pool.run, args=(chains,))
            thread.start()
            meanwhile(folder)  # nodes are started in the main thread alone
            thread.join()
        return load_history(folder / "timeline.jsonl")


def node_of(history: History, worker: str) -> str:
    """Name the node of a worker."""
    return next(stay.node for stay in history.stays if stay.worker == worker)


class Warnings(logging.Handler):
    """Keeps what the pool warns of."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a text."""
        self.texts.append(record.getMessage())


def main() -> None:
    """Let a node join, one be too small for the wish, and one be lost."""
    warnings = Warnings()
    logging.getLogger("tdc_ray").addHandler(warnings)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    first = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    added: dict[str, float] = {}

    def join(_folder: Path) -> None:
        time.sleep(4)
        added["time"] = time.time()
        added["node"] = cluster.add_node(num_cpus=1).node_id

    history = pooled(ComputeConfig(), 10, 2.0, join)
    starts = [s.started for s in history.spans if node_of(history, s.workers[0]) == added["node"]]
    found = {"seconds_until_a_joined_node_works": min(starts) - added["time"]}
    found["items_on_the_joined_node"] = len(starts)

    def grow(_folder: Path) -> None:
        time.sleep(12)
        cluster.add_node(num_cpus=2)

    history = pooled(ComputeConfig(cpus_per_actor=2, num_actors=3), 3, 0.1, grow)
    found["done_after_waiting"] = sum(span.outcome == "done" for span in history.spans)
    found["said"] = [text for text in warnings.texts if "work waits for actors" in text]

    def lose(folder: Path) -> None:
        while not (folder / first.node_id).exists():
            time.sleep(0.1)
        cluster.remove_node(first, allow_graceful=False)

    history = pooled(ComputeConfig(max_attempts=1), 6, 4.0, lose)
    found["outcomes"] = sorted(span.outcome for span in history.spans)
    ray.shutdown()
    cluster.shutdown()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

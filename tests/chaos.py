"""Runs of digits-smoke on a cluster whose workers, nodes and drivers are killed at random.

    python -m tests.chaos --runs 20 --out chaos.json
    python -m tests.chaos --runs 5 --s3 --out chaos-s3.json
    python -m tests.chaos --runs 3 --two-hosts --storage /tmp/tdc_ray-hosts --out chaos-hosts.json

Every run must end, no finished item may run twice, and the results must be those of a run that
nothing disturbed.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

# Ray reads these when it is imported, and so do the processes that it starts.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # noqa: SIM112  Ray's spelling

from ray.cluster_utils import Cluster
from s3fs import S3FileSystem

from tdc_ray.execution.timeline import load_history
from tdc_ray.runs.results import comparable, load_results
from tdc_ray.storage.files import write_json
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.run_dir import RunDir
from tests.hosts import HERE, Host, network
from tests.processes import children

KINDS = ("actor", "actor", "actor", "node", "node", "driver", "head")
"""What is killed; the head ends with all of its cluster, and another is started."""

HOST_KINDS = (*KINDS, "host", "host", "link")
"""The same where one node is on a host of its own, which may also be cut off."""

SECONDS_CUT_OFF = 40.0
"""Longer than Ray waits for a node that is silent."""

SECONDS_TO_NOTICE = 180.0
"""How long a driver may take to end whose head is gone."""

COMMAND = ("-m", "tdc_ray", "run", "--preset", "digits-smoke", "--compute.num-actors", "3")
MAX_STARTS = 12
"""Drivers after which a run is given up."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    seed: int
    kills: dict[str, int]
    starts: int
    seconds: float
    finished: bool
    ran_twice: list[str]
    equal: bool
    """Whether the results are those of the run that nothing disturbed."""


class Disturbed:
    """A cluster of three nodes and a driver on it."""

    def __init__(self, run_dir: str, log: Path, flags: Sequence[str], *, two_hosts: bool) -> None:
        self._where = {"node_ip_address": HERE} if two_hosts else {}
        self.host: Host | None = None
        self._start_cluster(two_hosts=two_hosts)
        self._command = [sys.executable, *COMMAND, "--run-dir", run_dir, *flags]
        self._log, self.starts = log, 0
        self.driver = self._start()

    def _start_cluster(self, *, two_hosts: bool) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, **self._where}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.host = Host(self.cluster.address) if two_hosts else None
        self.nodes: list[Any] = [self._add_node() for _ in range(2 if two_hosts else 3)]

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    def _add_node(self, attempts: int = 3) -> Any:
        try:
            return self.cluster.add_node(num_cpus=1, **self._where)
        except Exception as error:  # Ray's own, after 30 s: too little on a busy machine
            if attempts == 1 or "timed out during startup" not in str(error):
                raise
            return self._add_node(attempts - 1)

    def ended(self) -> bool:
        """Whether the run is finished, or given up; a driver that died is started again."""
        code = self.driver.poll()
        if code is None:
            return False
        if code == 0 or self.starts == MAX_STARTS:
            return True
        self.driver = self._start()
        return False

    def kill(self, kind: str, draw: random.Random) -> bool:
        """Kill one of a kind, if there is one."""
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
        elif kind == "head":
            if self.host is not None:
                self.host.kill()
            for node in [self.cluster.head_node, *self.nodes]:
                self.cluster.remove_node(node, allow_graceful=False)
            self.driver.wait(SECONDS_TO_NOTICE)  # it ends by itself
            self._start_cluster(two_hosts=self.host is not None)
        elif kind == "node":
            lost = self.nodes.pop(draw.randrange(len(self.nodes)))
            self.cluster.remove_node(lost, allow_graceful=False)
            self.nodes.append(self._add_node())
        elif self.host is not None and kind in ("host", "link"):
            if kind == "link":
                self.host.cut_off(SECONDS_CUT_OFF)
            self.host.kill()
            self.host.start_node()
        else:
            workers = children(os.getpid(), "ray::_Worker")
            workers += children(os.getpid(), "ray::RayTrainWorker")
            if not workers:
                return False
            os.kill(draw.choice(sorted(workers)), signal.SIGKILL)
        return True

    def close(self) -> None:
        self.driver.kill()
        self.driver.wait()
        if self.host is not None:
            self.host.kill()
        self.cluster.shutdown()


@contextmanager
def disturbed(
    run_dir: str, log: Path, flags: Sequence[str], *, two_hosts: bool
) -> Iterator[Disturbed]:
    """Start a cluster and a driver, and end both."""
    with network() if two_hosts else nullcontext():
        run = Disturbed(run_dir, log, flags, two_hosts=two_hosts)
        try:
            yield run
        finally:
            run.close()


def one_run(
    seed: int,
    run_dir: str,
    log: Path,
    undisturbed: Path,
    *,
    kinds: Sequence[str] | None = None,
    pause_s: float = 8.0,
    flags: Sequence[str] = (),
    two_hosts: bool = False,
) -> Outcome:
    """Run once, with kills at random times.

    Args:
        seed: Of what is killed and when.
        run_dir: A path or a URI.
        log: Where the drivers' output goes.
        undisturbed: ``results.json`` of the run that nothing disturbed.
        kinds: What is killed, in order; None means four to eight at random.
        pause_s: Mean seconds between kills.
        flags: More of the drivers' flags.
        two_hosts: Whether one node is on a host of its own.
    """
    draw, kills, started = random.Random(seed), Counter[str](), time.monotonic()
    all_kinds = HOST_KINDS if two_hosts else KINDS
    wanted = list(kinds or draw.choices(all_kinds, k=draw.randint(4, 8)))
    with disturbed(run_dir, log, flags, two_hosts=two_hosts) as run:
        next_kill = time.monotonic() + 10.0 + draw.expovariate(1 / pause_s)
        while not run.ended():
            if wanted and time.monotonic() > next_kill:
                if run.kill(wanted[0], draw):
                    kills[wanted.pop(0)] += 1
                next_kill = time.monotonic() + draw.expovariate(1 / pause_s)
            time.sleep(0.05)
        finished, starts = run.driver.poll() == 0, run.starts
    folder = RunDir(resolve_path(run_dir))
    equal = finished and comparable(load_results(folder.results)) == comparable(
        load_results(undisturbed)
    )
    return Outcome(
        seed=seed,
        kills=dict(kills),
        starts=starts,
        seconds=time.monotonic() - started,
        finished=finished,
        ran_twice=ran_twice(folder),
        equal=equal,
    )


def ran_twice(folder: RunDir) -> list[str]:
    """Name items that were started again after they were done."""
    done: set[tuple[str, str]] = set()
    found = []
    for span in load_history(folder.timeline).spans:
        item = (span.chain, span.item)
        if item in done:
            found.append(span.item)
        if span.outcome == "done":
            done.add(item)
    return found


def s3_bucket() -> str:
    """Start an S3 server that ends with this process; give the URI of a bucket."""
    server = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "s3_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "chaos"
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    S3FileSystem().mkdir("chaos")
    return "s3://chaos"


def main() -> None:
    """Run many runs, after those of an earlier call, and write their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--storage", default="/tmp/tdc_ray-chaos")
    parser.add_argument("--two-hosts", action="store_true", help="needs root")
    parser.add_argument("--s3", action="store_true", help="on an S3 server on loopback")
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    flags = parser.parse_args()
    local = Path("/tmp/tdc_ray-chaos")
    local.mkdir(exist_ok=True)
    undisturbed = local / "undisturbed"
    if not (undisturbed / "results.json").exists():
        subprocess.run([sys.executable, *COMMAND, "--run-dir", str(undisturbed)], check=True)
    outcomes = json.loads(flags.out.read_text()) if flags.out.exists() else []
    storage = s3_bucket() if flags.s3 else flags.storage
    for seed in range(len(outcomes), flags.runs):
        log = local / f"run-{seed}{'-s3' * flags.s3}.log"
        outcome = one_run(
            seed,
            f"{storage}/run-{seed}",
            log,
            undisturbed / "results.json",
            two_hosts=flags.two_hosts,
        )
        outcomes.append(dataclasses.asdict(outcome))
        sys.stdout.write(f"{outcomes[-1]}\n")
        write_json(flags.out, outcomes)
    bad = [one for one in outcomes if not one["finished"] or not one["equal"] or one["ran_twice"]]
    raise SystemExit(f"{len(bad)} of {len(outcomes)} runs went wrong: {bad}" if bad else 0)


if __name__ == "__main__":
    main()

"""Runs on a small cluster in which something of one kind fails again and again.

    python experiments/chaos.py --faults 1000
    python experiments/chaos.py --smoke
    python experiments/chaos.py --two-hosts --kinds host link     # needs root

A run of `digits-smoke` on an untrained base, on a head and two nodes of one CPU on this machine,
meets `--per-run` faults at random moments. The same command is started again whenever it ends
with an error, until it ends with none; then its results must be, bit for bit, those of a run that
nothing disturbed. The kinds:

- `driver`, `actor`, `raylet`, `gcs`: such a process is killed. `node`, `head`: all of a node's.
- `storage`: the next write of the run fails (disk full, quota, read-only, I/O error), in whichever
  process it is.
- `clock`: the wall clock jumps by up to two hours, back or ahead, and that of leases ahead by up
  to a minute, as after a machine's sleep.
- `memory`: for a few seconds an actor is given no more memory.
- `host`, `link`, with `--two-hosts`: one of the nodes is in a network namespace of its own, and is
  killed, or cut off for 40 s.

A run is lost if it does not end, or with other results. Repeated are the macs of attempts at items
that a fault cut, by their share of the time that the item took in the end, and those of finished
items that ran again. A fault is over when a result is there that was not; half of the others wait
for that. Runs are drawn by their number, and the same command goes on after the last
one; with a URI as `--storage` they are in an object store (where `storage` fails only before the
upload).

Hardware and hours: 2 CPU cores; 20 minutes a run at a load of 20 to 130.
The paper has no such table.
"""

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Ray reads these when it is imported, and so do the processes that it starts.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # noqa: SIM112  Ray's spelling

import tyro
from hosts import HERE, Host, network
from output import provenance, write_table
from processes import workers
from ray.cluster_utils import Cluster

from tdc_ray.errors import ConfigError
from tdc_ray.execution.timeline import History, load_history
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.runs.results import comparable, load_results
from tdc_ray.storage.files import append_json_line, exists, listing, read_json_lines, write_json
from tdc_ray.storage.object_store import display_path, is_remote, resolve_path
from tdc_ray.storage.run_dir import RunDir

KINDS = ("driver", "actor", "raylet", "node", "gcs", "head", "storage", "clock", "memory")
HOST_KINDS = ("host", "link")

NUM_NODES = 2
PAUSE_S = 6.0
"""Mean time between two faults."""

PATIENT_SHARE = 0.5
"""Share of the faults that come only when the one before is over: a start takes much longer."""

SECONDS_CUT_OFF = 40.0
"""Longer than Ray waits for a node that is silent."""

SECONDS_WITHOUT_MEMORY = 4.0

SECONDS_TO_NOTICE = 600.0
"""How long a driver may take to end whose head is gone, on a busy machine."""

SECONDS_BETWEEN_LOOKS = 0.5
"""Time between two looks for new results."""

MAX_STARTS = 30
"""Drivers after which a run is given up."""

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

COMMAND = (sys.executable, "-m", "tdc_ray", "run", "--preset", "digits-smoke")


@dataclass(frozen=True, kw_only=True)
class ChaosFlags:
    """What fails, how often, and where the runs are."""

    faults: int = 1000
    """Faults after which no further run begins."""
    per_run: int = 8
    """Most faults of a run."""
    kinds: tuple[str, ...] = KINDS
    """Kinds, one a run in turn."""
    two_hosts: bool = False
    """Whether one of the nodes is in a network namespace of its own."""
    smoke: bool = False
    """One fault of each of three kinds."""
    storage: Path = Path("runs")
    """Folder or URI of the runs."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run."""

    seed: int
    kinds: tuple[str, ...]
    faults: dict[str, int]
    starts: int
    """Drivers that were started."""
    seconds: float
    finished: bool
    equal: bool
    """Whether the results are those of the run that nothing disturbed."""
    macs: float
    """Macs of its items."""
    repeated_macs: float
    ran_twice: list[str]
    """Items that ran again after they were finished."""
    worst_recovery_s: float


@dataclass
class Control:
    """The folder by which faults get into processes (see chaos_hooks), and what is in it."""

    folder: Path
    clocks: dict[str, float] = field(default_factory=lambda: {"wall": 0.0, "lease": 0.0})

    def install(self) -> None:
        """Let all Python processes that are started from now on look into it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [str(Path(__file__).parent / "chaos_hooks"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ["TDC_RAY_CHAOS"] = str(self.folder)

    def reset(self) -> None:
        """Let nothing fail, and the clocks be right."""
        for path in self.folder.iterdir():
            path.unlink()
        self.clocks = {"wall": 0.0, "lease": 0.0}

    def fail_write(self, draw: random.Random) -> bool:
        """Let the next write fail; return whether there was one."""
        path = self.folder / "disk"
        _write_whole(path, str(draw.choice(WRITE_ERRORS)))
        deadline = time.monotonic() + PAUSE_S
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            path.unlink()
        except FileNotFoundError:
            return True
        return False

    def shift_clocks(self, draw: random.Random) -> None:
        """Let the clocks jump."""
        self.clocks["wall"] = draw.uniform(-7200.0, 7200.0)
        self.clocks["lease"] += draw.uniform(0.0, 60.0)
        _write_whole(self.folder / "clocks", json.dumps(self.clocks))


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)


class LocalCluster:
    """A head and some nodes of one CPU each, on this machine; a context manager that ends them."""

    def __init__(self, num_nodes: int, *, two_hosts: bool = False) -> None:
        self._num_nodes, self._two_hosts = num_nodes, two_hosts
        self._where = {"node_ip_address": HERE} if two_hosts else {}
        self.host: Host | None = None
        self._start()

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def address(self) -> str:
        """Address of the head."""
        return str(self._cluster.address)

    def kill_node(self, draw: random.Random) -> None:
        """Kill all processes of a node, and add another."""
        self._remove(draw.choice(self._nodes))
        self._nodes.append(self._add_node())

    def kill_raylet(self, draw: random.Random) -> None:
        """Kill a node's raylet, whose workers end by themselves, and add another node."""
        node = draw.choice(self._nodes)
        node.kill_raylet(check_alive=False)
        self._nodes.append(self._add_node())
        self._remove(node)

    def kill_gcs(self) -> None:
        """Kill the head's GCS alone."""
        self._cluster.head_node.kill_gcs_server(check_alive=False)

    def kill_head(self) -> None:
        """Kill all processes of the head."""
        self._cluster.head_node.kill_all_processes(check_alive=False, wait=True)

    def restart(self) -> None:
        """End what is left, and start another cluster."""
        self._end()
        self._start()

    def _start(self) -> None:
        self._cluster, self._nodes = Cluster(), list[Any]()
        self._add_node(num_cpus=0, include_dashboard=False, include_log_monitor=False)
        self.host = Host(self.address) if self._two_hosts else None
        self._nodes += [self._add_node() for _ in range(self._num_nodes - self._two_hosts)]

    def _end(self) -> None:
        if self.host is not None:
            self.host.kill()
        for node in [*self._nodes, self._cluster.head_node]:
            self._cluster.remove_node(node, allow_graceful=False)

    def _remove(self, node: Any) -> None:
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def _add_node(self, attempts: int = 10, **how: Any) -> Any:
        """Add a node of one CPU; the first one is the head."""
        try:
            return self._cluster.add_node(**({"num_cpus": 1} | how | self._where))
        except Exception as error:  # Ray's own, after 30 s: too little on a busy machine
            if attempts == 1 or "timed out during startup" not in str(error):
                raise
            return self._add_node(attempts - 1, **how)


class Disturbed:
    """A run on a cluster, whose driver is started again whenever it ends with an error."""

    def __init__(
        self, cluster: LocalCluster, command: Sequence[str], log: Path, control: Control
    ) -> None:
        self._cluster, self._command, self._control = cluster, command, control
        self._log, self.starts = log, 0
        self.driver = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        environment = os.environ | {"RAY_ADDRESS": self._cluster.address}
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    def ended(self) -> bool:
        """Whether the run is finished, or given up; a driver that failed is started again."""
        code = self.driver.poll()
        if code is None:
            return False
        if code == 0 or self.starts == MAX_STARTS:
            return True
        self.driver = self._start()
        return False

    def fail(self, kind: str, draw: random.Random) -> bool:
        """Let something of a kind fail; return whether there was something."""
        if kind == "driver":
            self.driver.kill()
            self.driver.wait()
        elif kind in ("gcs", "head"):
            self._cluster.kill_gcs() if kind == "gcs" else self._cluster.kill_head()
            self.driver.wait(SECONDS_TO_NOTICE)  # it ends by itself
            self._cluster.restart()
        elif kind == "node":
            self._cluster.kill_node(draw)
        elif kind == "raylet":
            self._cluster.kill_raylet(draw)
        elif kind == "storage":
            return self._control.fail_write(draw)
        elif kind == "clock":
            self._control.shift_clocks(draw)
        elif kind in HOST_KINDS:
            assert self._cluster.host is not None
            if kind == "link":
                self._cluster.host.cut_off(SECONDS_CUT_OFF)
            self._cluster.host.kill()
            self._cluster.host.start_node()
        else:
            if not (pids := workers()):
                return False
            take = _take_memory if kind == "memory" else _kill
            take(draw.choice(pids))
        return True


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _take_memory(pid: int) -> None:
    """Let a process have the memory that it has, and no more, for some seconds."""

    def limit(size: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

    with contextlib.suppress(FileNotFoundError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        limit(pages * resource.getpagesize())
        threading.Timer(SECONDS_WITHOUT_MEMORY, limit, [resource.RLIM_INFINITY]).start()


def one_run(
    seed: int,
    kinds: Sequence[str],
    cluster: LocalCluster,
    run_dir: Path,
    log: Path,
    undisturbed: Path,
    control: Control,
    flags: Sequence[str] = (),
) -> Outcome:
    """Run once, with faults at random moments.

    Args:
        seed: Of the moments, and of what fails.
        kinds: Of the faults, in order.
        cluster: Where.
        run_dir: Where its results go.
        log: Where the drivers' output goes.
        undisturbed: ``results.json`` of the run that nothing disturbed.
        control: How faults get into processes.
        flags: More of the drivers' flags.
    """
    draw, wanted, done = random.Random(seed), list(kinds), Counter[str]()
    started = looked = time.monotonic()
    num_results, failed_at, worst = 0, None, 0.0
    command = [*COMMAND, "--run-dir", display_path(run_dir), *flags]
    run = Disturbed(cluster, command, log, control)
    try:
        next_fault, patient = started + draw.expovariate(1 / PAUSE_S), False
        while True:
            ended = run.ended()
            if ended or time.monotonic() > looked + SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                count = len(listing(run_dir, "**/*.json"))
                if failed_at is not None and (ended or count > num_results):
                    worst, failed_at = max(worst, looked - failed_at), None
                num_results = max(count, num_results)
            if ended:
                break
            if wanted and time.monotonic() > next_fault and not (patient and failed_at):
                now = time.monotonic()
                if run.fail(wanted[0], draw):
                    done[wanted.pop(0)] += 1
                    failed_at = failed_at or now
                next_fault = time.monotonic() + draw.expovariate(1 / PAUSE_S)
                patient = draw.random() < PATIENT_SHARE
            time.sleep(0.05)
    finally:
        run.driver.kill()
        code = run.driver.wait()
    folder = RunDir(run_dir)
    results = [load_results(path) for path in (folder.results, undisturbed) if code == 0]
    history = load_history(folder.timeline)
    return Outcome(
        seed=seed,
        kinds=tuple(dict.fromkeys(kinds)),
        faults=dict(done),
        starts=run.starts,
        seconds=time.monotonic() - started,
        finished=code == 0,
        equal=code == 0 and comparable(results[0]) == comparable(results[1]),
        macs=sum({(span.chain, span.item): span.macs for span in history.spans}.values()),
        repeated_macs=repeated_macs(history),
        ran_twice=ran_twice(history),
        worst_recovery_s=worst,
    )


def ran_twice(history: History) -> list[str]:
    """Name items that were started again after they were done."""
    done: set[tuple[str, str]] = set()
    found = []
    for span in history.spans:
        item = (span.chain, span.item)
        if item in done:
            found.append(span.item)
        if span.outcome == "done":
            done.add(item)
    return found


def repeated_macs(history: History) -> float:
    """Return the macs of attempts beside those that finished the items, the first time.

    Of an attempt that was cut it is known how long it took: its macs are the item's by its share
    of the time of the attempt that was not, and all of them at most.
    """
    seconds: dict[tuple[str, str], float] = {}
    repeated = 0.0
    spans = [(span, span.ended - span.started) for span in history.spans if span.ended is not None]
    for span, took in spans:
        if span.outcome == "done":
            if (span.chain, span.item) in seconds:
                repeated += span.macs
            seconds.setdefault((span.chain, span.item), took)
    for span, took in spans:
        if span.outcome != "done":
            whole = seconds.get((span.chain, span.item), 0.0)
            repeated += span.macs * (min(1.0, max(0.0, took / whole)) if whole > 0 else 1.0)
    return repeated


def num_faults(outcomes: Sequence[Outcome]) -> int:
    """Count the faults of runs."""
    return sum(sum(one.faults.values()) for one in outcomes)


def table_row(kind: str, outcomes: Sequence[Outcome]) -> list[str]:
    """Sum up the runs of a kind."""
    lost = sum(not one.finished or not one.equal for one in outcomes)
    macs = sum(one.macs for one in outcomes)
    repeated = sum(one.repeated_macs for one in outcomes)
    return [
        kind,
        str(num_faults(outcomes)),
        str(len(outcomes)),
        str(lost),
        f"{repeated / macs:.1%}" if macs else "-",
        str(sum(len(one.ran_twice) for one in outcomes)),
        f"{max(one.worst_recovery_s for one in outcomes):.1f} s",
    ]


@contextmanager
def prepared(flags: ChaosFlags, folder: Path) -> Iterator[tuple[LocalCluster, Control, list[str]]]:
    """Make the base and the undisturbed run, where they are missing, and start the cluster."""
    base = folder / "base" / "unet"
    if not base.exists():
        save_unet(build_unet(architecture("tiny")), base)
    more = ["--base", str(base), "--compute.num-actors", str(NUM_NODES)]
    more += ["--evaluate.cache-dir", str(folder / "cache")]
    if not (folder / "undisturbed" / "results.json").exists():
        subprocess.run([*COMMAND, "--run-dir", str(folder / "undisturbed"), *more], check=True)
    control = Control(folder / "control")
    control.install()
    control.reset()
    with (
        network() if flags.two_hosts else nullcontext(),
        LocalCluster(NUM_NODES, two_hosts=flags.two_hosts) as cluster,
    ):
        yield cluster, control, more


def main(flags: ChaosFlags) -> None:
    """Disturb runs, after those of an earlier call, and write after each what came of all."""
    if flags.smoke:
        smoke = {"faults": 3, "per_run": 1, "kinds": ("storage", "actor", "clock")}
        flags = dataclasses.replace(flags, **smoke)
    storage = resolve_path(flags.storage) / "chaos"
    folder = Path("runs/chaos") if is_remote(storage) else storage  # of logs and what is shared
    if unknown := set(flags.kinds) - set(KINDS) - set(HOST_KINDS):
        raise ConfigError(f"--kinds must be of {', '.join(KINDS)}, got {', '.join(unknown)}.")
    if not flags.two_hosts and set(flags.kinds) & set(HOST_KINDS):
        raise ConfigError(f"--kinds {' '.join(HOST_KINDS)} need --two-hosts.")
    outcomes_file = folder / "outcomes.jsonl"
    lines = read_json_lines(outcomes_file) if exists(outcomes_file) else []
    outcomes = [Outcome(**line) for line in lines]
    if outcomes:
        write(folder, outcomes)
    if num_faults(outcomes) >= flags.faults:
        return
    with prepared(flags, folder.resolve()) as (cluster, control, more):
        while num_faults(outcomes) < flags.faults:
            seed = len(outcomes)
            kind = flags.kinds[seed % len(flags.kinds)]
            outcome = one_run(
                seed,
                [kind] * flags.per_run,
                cluster,
                storage / f"run-{seed}",
                folder / f"run-{seed}.log",
                folder / "undisturbed" / "results.json",
                control,
                more,
            )
            control.reset()
            append_json_line(outcomes_file, dataclasses.asdict(outcome))
            outcomes.append(outcome)
            write(folder, outcomes)


def write(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the table and the record of all runs."""
    of_kind: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        of_kind.setdefault("+".join(outcome.kinds), []).append(outcome)
    columns = ["kind", "faults", "runs", "lost", "repeated macs", "finished items run again"]
    rows = [table_row(kind, some) for kind, some in of_kind.items()]
    rows.append(table_row("all", outcomes))
    note = (
        "Lost: runs that did not end, or with other results than the one that was not disturbed."
    )
    write_table(folder, "chaos", [*columns, "worst recovery"], rows, note)
    record = [dataclasses.asdict(outcome) for outcome in outcomes]
    write_json(folder / "chaos.json", {"made_by": provenance(), "runs": record})


if __name__ == "__main__":
    main(tyro.cli(ChaosFlags, description=__doc__))

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tdc_ray.errors import ClusterError
from tdc_ray.execution.ray import cluster
from tdc_ray.execution.ray.cluster import connected

SLOW = Exception("The current node timed out during startup.\nThis could happen ...")


class Starts:
    """Ray's part that starts it: leaves a process behind whenever it fails.

    Another thread starts one of its own at the same time.
    """

    def __init__(self, *errors: Exception | None) -> None:
        self.errors, self.addresses, self.left, self.others = list(errors), [], [], []

    def init(self, address, **_):
        self.addresses.append(address)
        if error := self.errors.pop(0):
            server = Path(cluster.ray.__file__).parent / "core/src/ray/gcs/gcs_server"
            for name, processes in ((server, self.left), ("sleep", self.others)):
                process = subprocess.Popen([name, "60"], executable=shutil.which("sleep"))
                processes.append(process)
            raise error

    def end(self):
        for process in self.left + self.others:
            process.kill()
            process.wait()


@pytest.fixture
def starts(monkeypatch):
    used = []

    def use(*errors: Exception | None) -> Starts:
        used.append(made := Starts(*errors))
        for name, function in (("init", made.init), ("shutdown", bool), ("is_initialized", bool)):
            monkeypatch.setattr(cluster.ray, name, function)
        return made

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield use
    for made in used:
        made.end()


def test_a_local_ray_that_is_too_slow_is_started_once_more(starts, caplog):
    made = starts(SLOW, None)
    with connected():
        assert made.addresses == ["local", "local"]
        assert made.left[0].wait(5) < 0
        assert made.others[0].poll() is None
    (line,) = caplog.messages
    assert line.endswith("once more: Exception: The current node timed out during startup.")


@pytest.mark.parametrize(
    ("address", "errors", "raised", "tries"),
    [
        ("local", [SLOW, SLOW], ClusterError, 2),
        ("local", [ValueError("num_cpus")], ValueError, 1),
        ("local", [RuntimeError("another version of Ray")], ClusterError, 1),
        ("local", [ImportError("ray")], ImportError, 1),
        ("auto", [SLOW], ClusterError, 1),
    ],
)
def test_no_other_start_of_ray_is_tried_again(starts, address, errors, raised, tries):
    made = starts(*errors)
    with pytest.raises(raised), connected(address=address):
        pass
    assert len(made.addresses) == tries
    for process in made.left:
        if address == "auto":  # the cluster is another's
            assert process.poll() is None
        else:
            assert process.wait(5) < 0


HALF_STARTED = """
import os
from pathlib import Path
import ray
from ray._private import services
from tdc_ray.execution.interrupts import child_processes
from tdc_ray.execution.ray.cluster import connected

really = services.get_node

def unregistered(*_):
    services.get_node = really
    raise Exception("as if the node came late")

def count():
    server = f"{os.path.dirname(ray.__file__)}/core/src/ray/gcs/gcs_server".encode()
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in child_processes(os.getpid())]
    return sum(line.startswith(server) for line in lines)

services.get_node = unregistered
with connected(num_cpus=1):
    print(services.get_node is really, count(), ray.get(ray.remote(lambda: "works").remote()))
"""


@pytest.mark.slow  # starts Ray twice
def test_what_was_half_started_is_gone_when_ray_is_started_once_more():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", HALF_STARTED],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.stdout.split() == ["True", "1", "works"], done.stderr
    assert "once more: Exception: as if the node came late" in done.stderr

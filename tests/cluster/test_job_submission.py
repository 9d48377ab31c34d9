"""``ray job submit`` against a cluster whose Python has no tdc_ray: all comes with the job."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdc_ray.execution.timeline import load_history
from tdc_ray.storage.run_dir import RunDir
from tests.processes import children

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """A Python that has all packages of this one, but not tdc_ray."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    # The packages' own .pth files, one of which adds tdc_ray, are not read from there.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    found = folder / "bin" / "python"
    missing = subprocess.run([found, "-c", "import tdc_ray"], cwd=folder, capture_output=True)
    assert b"No module named 'tdc_ray'" in missing.stderr
    return found


@pytest.fixture(scope="module")
def head(python) -> Iterator[tuple[int, str]]:
    """The process and the address of a head that takes jobs; all below it ends with the tests."""
    temporary = Path(tempfile.mkdtemp(prefix="tdc", dir="/tmp"))  # sockets' names must be short
    port = free_port()
    flags = ["--head", f"--port={free_port()}", f"--dashboard-port={port}", "--num-cpus=2"]
    flags += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0"]
    flags += [f"--ray-client-server-port={free_port()}", "--max-worker-port=0"]
    flags += [f"--temp-dir={temporary}", "--block"]
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment |= {"RAY_worker_niceness": "0"}
    head = subprocess.Popen(
        [python, "-m", "ray.scripts.scripts", "start", *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while job("list", address=f"http://127.0.0.1:{port}").returncode:
        assert head.poll() is None
        assert time.monotonic() < deadline
        time.sleep(1)
    yield head.pid, f"http://127.0.0.1:{port}"
    below = children(head.pid, "")
    for pid in [head.pid, *below]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    head.wait()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def address(head) -> str:
    return head[1]


def job(*arguments: str, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", arguments[0]]
    return subprocess.run(
        [*command, "--address", address, *arguments[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def info(address: str, name: str):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address).get_job_info(name)


@pytest.mark.slow
def test_a_job_is_stopped_and_submitted_again_and_goes_on(head, cache_dir, tmp_path, importable):
    from chaos import ran_twice

    pid, address = head
    run_dir = tmp_path / "run"
    flags = ["--run-dir", str(run_dir), "--evaluate.cache-dir", str(cache_dir)]
    flags += ["--compute.num-actors", "1"]
    entry = ["--", "python", "-m", "tdc_ray", "run", "--preset", "digits-smoke", *flags]
    started = job(
        "submit",
        "--working-dir",
        ".",
        "--submission-id",
        "one",
        "--no-wait",
        *entry,
        address=address,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    while not list(run_dir.glob("groups/*/second-order.json")):
        assert not info(address, "one").status.is_terminal(), job("logs", "one", address=address)
        time.sleep(0.2)
    assert children(pid, "ray::_Worker")
    assert job("stop", "one", address=address).returncode == 0
    assert info(address, "one").status == "STOPPED"
    deadline = time.monotonic() + 60
    while children(pid, "ray::_Worker"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert not (run_dir / "results.json").exists()

    again = job("submit", "--working-dir", ".", "--submission-id", "two", *entry, address=address)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "stage 2: 4 groups" in again.stdout  # its progress is streamed
    assert info(address, "two").driver_exit_code == 0
    assert (run_dir / "results.json").exists()
    assert ran_twice(load_history(RunDir(run_dir).timeline)) == []


@pytest.mark.slow
def test_an_experiment_that_fails_has_a_non_zero_code(address, tmp_path):
    flags = ["--preset", "mnist", "--data", str(tmp_path / "nowhere.npz")]
    flags += ["--storage", str(tmp_path)]
    entry = ["--", "python", "experiments/main_results.py", *flags]
    failed = job("submit", "--working-dir", ".", "--submission-id", "bad", *entry, address=address)
    assert failed.returncode != 0
    assert info(address, "bad").driver_exit_code == 1
    assert "nowhere.npz" in failed.stdout

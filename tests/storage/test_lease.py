import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tdc_ray.errors import StorageError
from tdc_ray.storage import lease, object_store
from tdc_ray.storage.fence import adopt, fences
from tdc_ray.storage.files import (
    append_json_line,
    read_bytes,
    read_json_lines,
    remove,
    write_text,
)
from tdc_ray.storage.lease import LeaseFiles, hold_lease
from tdc_ray.storage.object_store import resolve_path

TIMES = {"RENEWED_EVERY_S": 0.5, "POLLED_EVERY_S": 0.3}
"""Of all drivers here, so that tests wait less for clocks."""


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    for name, seconds in TIMES.items():
        monkeypatch.setattr(lease, name, seconds)


# --- the lock of this machine ------------------------------------------------------------------

HOLD = """
import json, sys
from tdc_ray.storage import lease
from tdc_ray.storage.object_store import resolve_path
vars(lease).update(json.loads(sys.argv[2]))
with lease.hold_lease(resolve_path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold_command(run_dir, **times):
    return [sys.executable, "-c", HOLD, str(run_dir), json.dumps(TIMES | times)]


@contextmanager
def held_by_another_process(run_dir):
    pipe = subprocess.PIPE
    with subprocess.Popen(
        hold_command(run_dir), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def hold(run_dir):
    with hold_lease(run_dir):
        return "held"


def test_a_second_driver_is_refused_and_told_the_first_ones_process(tmp_path):
    run_dir = tmp_path / "runs" / "one"  # it is made
    with held_by_another_process(run_dir) as process:
        with pytest.raises(StorageError) as caught:
            hold(run_dir)
        assert f"{run_dir} is in use by process {process.pid}:" in str(caught.value)
        assert "--run-dir" in str(caught.value)
        second = subprocess.run(hold_command(run_dir), capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"in use by process {process.pid}" in second.stderr
        assert hold(tmp_path / "runs" / "other") == "held"


def test_the_hold_ends_with_a_killed_driver(tmp_path):
    with held_by_another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert hold(tmp_path) == "held"


def test_the_hold_ends_with_the_block_of_the_other_process(tmp_path):
    with held_by_another_process(tmp_path) as process:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == 0
        assert hold(tmp_path) == "held"


def test_the_hold_ends_with_an_error_too(tmp_path):
    def fail():
        with hold_lease(tmp_path):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert hold(tmp_path) == hold(tmp_path) == "held"


def test_the_process_is_told_anew_by_every_holder(tmp_path):
    (tmp_path / ".lock").write_text("123456789012")  # an earlier holder's, and longer
    with held_by_another_process(tmp_path) as process:
        assert (tmp_path / ".lock").read_text() == json.dumps(process.pid)


# --- the lease ---------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def run_dir(request, tmp_path):
    """A run directory; a local one is seen by drivers on hosts whose locks are their own."""
    if request.param == "local":
        return tmp_path / "run"
    return resolve_path(f"{request.getfixturevalue('bucket')}/run")


@pytest.fixture
def other_host(monkeypatch):
    """Let this process be on another host: locks and process numbers there are others."""
    monkeypatch.setattr(lease, "_pid_namespace", lambda: "another")
    monkeypatch.setattr(lease, "LOCK_FILE", ".other-lock")


@pytest.fixture
def stale_soon(monkeypatch):
    monkeypatch.setattr(lease, "STALE_AFTER_S", 2.0)
    monkeypatch.setattr(lease, "MARGIN_S", 0.2)


def lease_of(run_dir: Path) -> dict:
    files = LeaseFiles(run_dir)
    return files.read(files.last())


def create_lease(run_dir: Path, document: dict) -> None:
    """Create the next one, as another driver does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    files = LeaseFiles(run_dir)
    assert files.create(files.last() + 1, json.dumps(document).encode())


def test_a_driver_on_another_host_is_refused_and_told_host_and_process(run_dir, other_host):
    with held_by_another_process(object_store.display_path(run_dir)) as process:
        held = lease_of(run_dir)
        started = time.monotonic()
        with pytest.raises(StorageError) as caught:
            hold(run_dir)
        assert time.monotonic() - started < lease.STALE_AFTER_S
        assert f"process {process.pid} on host {held['host']}" in str(caught.value)
        assert held["started"] in str(caught.value)
        assert str(caught.value).startswith(
            f"run directory {object_store.display_path(run_dir)} is in use"
        )


def test_a_killed_drivers_lease_is_taken_at_once_on_its_host(run_dir):
    with held_by_another_process(object_store.display_path(run_dir)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        started = time.monotonic()
        assert hold(run_dir) == "held"
        assert time.monotonic() - started < lease.STALE_AFTER_S / 2


def test_a_killed_drivers_lease_runs_out_on_other_hosts(bucket, other_host, stale_soon):
    run_dir = resolve_path(f"{bucket}/run")
    with held_by_another_process(object_store.display_path(run_dir)) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        started = time.monotonic()
        assert hold(run_dir) == "held"
        assert lease.STALE_AFTER_S <= time.monotonic() - started < lease.STALE_AFTER_S + 8


def test_a_lease_is_released(run_dir, other_host):
    with held_by_another_process(object_store.display_path(run_dir)) as process:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == 0
    started = time.monotonic()
    assert hold(run_dir) == "held"
    assert time.monotonic() - started < lease.STALE_AFTER_S


def test_a_torn_lease_runs_out_too(run_dir, stale_soon):
    create_lease(run_dir, {})
    assert hold(run_dir) == "held"


def test_a_suspended_driver_whose_lease_was_taken_stops(run_dir, other_host, stale_soon):
    with held_by_another_process(object_store.display_path(run_dir)) as process:
        process.send_signal(signal.SIGSTOP)
        with hold_lease(run_dir):
            process.send_signal(signal.SIGCONT)
            assert process.wait(30) == 1  # though nobody asked it to end
            assert f"was taken over by process {os.getpid()}" in process.stderr.read()
            assert lease_of(run_dir)["pid"] == os.getpid()


def test_the_loss_of_a_lease_interrupts_the_block(run_dir, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.1)
    before = signal.getsignal(lease._STOP)

    def lose():
        with hold_lease(run_dir):
            create_lease(run_dir, {"id": "x", "pid": 1, "host": "thief"})
            threading.Event().wait(30)
            pytest.fail("it went on")

    with pytest.raises(StorageError, match="taken over by process 1 on host thief"):
        lose()
    assert lease_of(run_dir)["id"] == "x"
    assert signal.getsignal(lease._STOP) == before


def test_a_lease_that_cannot_be_renewed_for_a_moment_is_kept(bucket, monkeypatch, caplog):
    monkeypatch.setattr(lease, "RENEWED_EVERY_S", 0.1)
    run_dir, write, failed = resolve_path(f"{bucket}/run"), object_store.write, threading.Event()

    def fail(path, content):
        failed.set()
        raise StorageError("a hiccup")

    with hold_lease(run_dir):
        monkeypatch.setattr(object_store, "write", fail)
        assert failed.wait(20)
        monkeypatch.setattr(object_store, "write", write)
        count = lease_of(run_dir)["count"]
        deadline = time.monotonic() + 20
        while lease_of(run_dir)["count"] == count:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "a hiccup" in caplog.text


def test_of_drivers_that_start_at_once_one_holds(bucket):
    command = hold_command(f"{bucket}/run")
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for _ in range(3)
    ]
    said = [process.stdout.readline() for process in started]
    assert sorted(said) == ["", "", "held\n"]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0 or "is in use by process" in errors


def test_numbers_rise_and_one_driver_alone_creates_each(run_dir):
    for number in (1, 2, 3):
        with hold_lease(run_dir):
            assert LeaseFiles(run_dir).last() == number
            assert not LeaseFiles(run_dir).create(number, b"{}")


def test_a_lease_of_another_version_is_waited_for(run_dir, stale_soon):
    run_dir.mkdir(parents=True, exist_ok=True)
    LeaseFiles(run_dir).write(0, json.dumps({"id": "x", "pid": 1, "host": "old"}).encode())
    started = time.monotonic()
    assert hold(run_dir) == "held"
    assert time.monotonic() - started >= lease.STALE_AFTER_S


def test_a_store_that_lets_all_create_is_told_of_and_its_last_writer_holds(
    bucket, monkeypatch, caplog
):
    run_dir = resolve_path(f"{bucket}/run")
    monkeypatch.setattr(
        object_store, "create", lambda path, content: object_store.write(path, content) is None
    )
    assert hold(run_dir) == "held"
    assert "lets several drivers create the same file" in caplog.text
    caplog.clear()

    def overtake(_seconds):
        LeaseFiles(run_dir).write(2, json.dumps({"id": "x", "pid": 1, "host": "thief"}).encode())

    monkeypatch.setattr(lease, "SETTLED_AFTER_S", 0.0)
    other = lease.Lease(run_dir, LeaseFiles(run_dir), sleep=overtake)
    with pytest.raises(StorageError, match="in use by process 1 on host thief"):
        other.acquire()


# --- the fence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ["driver", "worker"])
def test_a_process_whose_lease_was_taken_publishes_nothing_more(run_dir, process):
    held = lease.Lease(run_dir, LeaseFiles(run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    held.acquire()
    adopt([held if process == "driver" else pickle.loads(pickle.dumps(held))])
    try:
        write_text(run_dir / "a", "kept")
        held._valid_until = 0.0  # suspended: the driver begins it anew
        held.check()
        append_json_line(run_dir / "lines.jsonl", 1)
        create_lease(run_dir, {"id": "x", "pid": 1, "host": "thief"})
        for write in (
            lambda: write_text(run_dir / "a", "lost"),
            lambda: append_json_line(run_dir / "lines.jsonl", 2),
            lambda: remove(run_dir / "a"),
        ):
            with pytest.raises(StorageError, match="taken over by process 1 on host thief"):
                write()
        write_text(run_dir.parent / "elsewhere", "free")
    finally:
        adopt([])
    assert read_bytes(run_dir / "a") == b"kept"
    assert read_json_lines(run_dir / "lines.jsonl") == [1]


@pytest.mark.parametrize("process", ["driver", "worker"])
def test_a_lease_that_is_just_begun_anew_is_not_taken_for_anothers(tmp_path, process, monkeypatch):
    held = lease.Lease(tmp_path, LeaseFiles(tmp_path))
    held.acquire()
    worker = pickle.loads(pickle.dumps(held))
    own, read = LeaseFiles(tmp_path).read(1), LeaseFiles.read
    answers = iter([{}, own, None])
    monkeypatch.setattr(lease, "WRITTEN_WITHIN_S", 0.0)
    monkeypatch.setattr(
        LeaseFiles, "read", lambda *args: read(*args) if args[1] == 1 else next(answers)
    )
    (held if process == "driver" else worker).check()
    assert held.lost_to is None


def test_systems_without_realtime_signals_have_another(monkeypatch):
    monkeypatch.delattr(signal, "SIGRTMIN")  # as macOS
    spec = importlib.util.find_spec("tdc_ray.storage.lease")
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    assert there._STOP == signal.SIGUSR2


def test_a_fence_stands_while_the_lease_is_held(run_dir):
    with hold_lease(run_dir):
        assert [fence.run_dir for fence in fences()] == [run_dir]
    assert fences() == ()


def test_ctrl_c_is_still_ctrl_c(run_dir):
    with pytest.raises(KeyboardInterrupt), hold_lease(run_dir):
        raise KeyboardInterrupt
    assert hold(run_dir) == "held"

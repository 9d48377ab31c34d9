"""Real kills of real processes: the command repeated ends with the results of an uninterrupted
run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdc_ray.runs.results import comparable, load_results
from tests.interrupts import commands, is_right, one_try
from tests.processes import children

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def start(folder: Path, cache_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tdc_ray", "run", "--preset", "digits-smoke"]
    flags = ["--run-dir", str(folder), "--evaluate.cache-dir", str(cache_dir)]
    flags += ["--compute.num-actors", "1"]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, *flags],
            stdout=log,
            stderr=log,
            start_new_session=True,
            # A shell starts its background jobs deaf to it, and what they start inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def wait_for(folder: Path, pattern: str, driver: subprocess.Popen[bytes]) -> None:
    while not list(folder.glob(pattern)):
        assert driver.poll() is None, folder.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.02)


@pytest.mark.slow
def test_kills_of_train_worker_actor_and_driver_change_no_result(
    finished_run, cache_dir, tmp_path
):
    folder = tmp_path / "run"
    driver = start(folder, cache_dir)
    wait_for(folder, "base/training/checkpoint_*", driver)
    for pid in children(driver.pid, "ray::RayTrainWorker"):
        os.kill(pid, signal.SIGKILL)
    wait_for(folder, "groups/*/second-order.json", driver)
    actor = children(driver.pid, "ray::_Worker")[0]
    os.kill(actor, signal.SIGKILL)
    while "lost its worker" not in (folder / "run.log").read_text():
        assert driver.poll() is None, folder.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.02)
    wait_for(folder, "experts/expert-*", driver)
    driver.kill()
    driver.wait()
    assert not (folder / "results.json").exists()

    again = start(folder, cache_dir)
    assert again.wait() == 0, folder.with_suffix(".log").read_text()[-3000:]
    results = load_results(folder / "results.json")
    assert comparable(results) == comparable(load_results(finished_run / "results.json"))


@pytest.mark.slow
def test_ctrl_c_ends_everything_and_says_how_to_go_on(cache_dir, tmp_path):
    folder = tmp_path / "run"
    driver = start(folder, cache_dir)
    wait_for(folder, "base/training/checkpoint_*", driver)
    started = children(driver.pid, "ray::")
    assert started
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=30) == 130
    assert "run the same command again" in folder.with_suffix(".log").read_text()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in started):
        assert time.monotonic() < deadline, "Ray processes outlived their driver"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_an_interrupt_at_a_random_moment_ends_all_and_says_how_to_go_on(seed, cache_dir, tmp_path):
    draw = random.Random(seed)
    named = commands(tmp_path, cache_dir)
    arguments = named["sweep" if seed % 3 == 0 else "run"]
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    outcome = one_try(arguments, draw.uniform(1.0, 40.0), number, twice=seed % 2 == 0)
    assert is_right(outcome), outcome

"""Smoke runs of the experiments that measure the system itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from tdc_ray.storage.files import read_json

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.ray
def test_makespan_and_memory_are_measured(tmp_path):
    processes = {}
    flags = {"scheduling": [], "worker_memory": [], "soak": ["--storage", str(tmp_path)]}
    for name, more in flags.items():  # side by side: one mostly waits
        command = [sys.executable, f"experiments/{name}.py", "--smoke", *more]
        command += ["--json", str(tmp_path / f"{name}.json")]
        processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert {name: process.wait(300) for name, process in processes.items()} == dict.fromkeys(
        processes, 0
    )
    spans = read_json(tmp_path / "scheduling.json")["makespan_over_least_by_workers"]["2"]
    assert 1.0 <= spans["ten_items"] < spans["groups"] + 1.0
    assert spans["milliseconds_per_empty_item"] > 0
    memory = read_json(tmp_path / "worker_memory.json")
    assert 0 < memory["weights_mb"] < 2
    assert min(memory["loaded_mb"]) > 50
    assert len(memory["denoised_mb"]) == 2
    soak = read_json(tmp_path / "soak.json")
    assert [sample["items"] for sample in soak["samples"]] == [200, 400, 600, 800, 1000]
    last = {name: line["last"] for name, line in soak["fitted"].items()}
    assert last["driver_mb"] > 50
    assert last["actors_mb"] > 50
    assert last["actors_files"] > last["driver_files"] / 10 > 1
    assert 0 <= last["object_store_mb"] < 100


def test_growth_is_that_of_the_driver_with_the_most_samples(importable):
    from soak import QUANTITIES, fitted

    def samples(driver: str, count: int, growth: float) -> list[dict]:
        return [
            {"driver": driver, "items": 200 * i, **dict.fromkeys(QUANTITIES, 7 + growth * i)}
            for i in range(count)
        ]

    found = fitted(samples("cut", 5, 3.0) + samples("whole", 20, 0.2))["actors_mb"]
    assert found["slope_per_1000"] == pytest.approx(1.0)
    assert found["half_interval"] == pytest.approx(0.0, abs=1e-6)
    assert (found["first"], found["last"]) == (7.4, 10.8)
    flat = fitted(samples("flat", 20, 0.0))["actors_mb"]
    assert (flat["slope_per_1000"], flat["half_interval"]) == (0.0, 0.0)


@pytest.mark.slow
def test_the_fast_loop_is_the_plain_one(tmp_path):
    command = [sys.executable, "experiments/loss_curves.py", "--smoke", "--storage", str(tmp_path)]
    subprocess.run([*command, "--threads", "1"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    losses = read_json(tmp_path / "loss_curves-digits-smoke" / "loss_curves.json")["losses"]
    plain, moved, ours, half = losses.values()
    assert ours == pytest.approx(plain, rel=1e-3)
    assert moved == pytest.approx(plain, rel=1e-3)
    assert half == pytest.approx(plain, rel=0.05)
    assert len({tuple(some) for some in (plain, moved, ours, half)}) > 2

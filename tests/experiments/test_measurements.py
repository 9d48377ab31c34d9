"""The experiments that measure the system itself, in little."""

import sys
from pathlib import Path

import pytest

from tdc_ray.storage import read_json

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def experiments(ray_cluster, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    monkeypatch.setattr(sys, "argv", ["measurement.py"])


def test_the_makespan_is_held_against_the_least_possible(tmp_path):
    import scheduling

    scheduling.main(scheduling.SchedulingFlags(smoke=True, json=tmp_path / "found.json"))
    found = read_json(tmp_path / "found.json")["makespan_over_least_by_workers"]["2"]
    assert 1.0 <= found["ten_items"] < found["groups"] + 1.0
    assert found["milliseconds_per_empty_item"] > 0


def test_the_private_memory_of_workers_is_held_against_one_that_loaded_nothing(tmp_path):
    import worker_memory

    worker_memory.main(worker_memory.MemoryFlags(smoke=True, json=tmp_path / "found.json"))
    found = read_json(tmp_path / "found.json")
    assert 0 < found["weights_mb"] < 2
    assert min(found["loaded_mb"]) > 50
    assert len(found["denoised_mb"]) == 2

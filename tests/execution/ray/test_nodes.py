"""Nodes that join, are too small, and are lost; in a process with a cluster of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.execution.ray.nodes"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_node_that_joins_takes_work(found):
    assert found["items_on_the_joined_node"] > 0


def test_on_a_cluster_too_small_for_the_wish_work_waits_and_says_so_once(found):
    (said,) = found["said"]
    assert said.startswith("work waits for actors: 3 of {'CPU': 2, 'GPU': 0.0} could be used")
    assert found["done_after_waiting"] == 3


def test_a_lost_node_costs_its_item_no_attempt(found):
    assert found["outcomes"] == ["done"] * 6 + ["node_lost"]

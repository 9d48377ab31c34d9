"""The experiment with faults: what it counts, and short forms of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tdc_ray.execution.timeline import History, Span
from tdc_ray.storage.files import read_json

ROOT = Path(__file__).parents[2]


def span(item: str, started: float, ended: float | None, outcome: str = "done") -> Span:
    return Span("experts", "group-00", 1, item, ("worker-0",), 1, started, ended, outcome, 100.0)


def test_work_that_faults_cut_is_counted(importable):
    from chaos import ran_twice, repeated_macs

    cut = [span("a", 0, 4, "worker_lost"), span("a", 5, 13), span("b", 5, 9, "driver_lost")]
    cut += [span("b", 10, 11), span("c", 11, 12, "worker_lost"), span("d", 13, None, "running")]
    history = History((*cut, span("e", 14, 15)), (), {})
    assert ran_twice(history) == []
    assert repeated_macs(history) == 50 + 100 + 100  # half, all, and all of what was not finished
    again = History((*history.spans, span("e", 16, 17)), (), {})
    assert ran_twice(again) == ["e"]
    assert repeated_macs(again) == 350


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_lost_workers_nodes_and_heads_change_no_result_and_nothing_is_done_twice(
    importable, finished_run, cache_dir, tmp_path
):
    from chaos import Control, LocalCluster, one_run

    with LocalCluster(3) as cluster:
        outcome = one_run(
            0,
            ("actor", "node", "head", "actor"),
            cluster,
            tmp_path / "run",
            tmp_path / "run.log",
            finished_run / "results.json",
            Control(tmp_path),
            ("--evaluate.cache-dir", str(cache_dir), "--compute.num-actors", "3"),
        )
    assert outcome.finished, (tmp_path / "run.log").read_text()[-3000:]
    assert outcome.faults == {"actor": 2, "node": 1, "head": 1}
    assert outcome.ran_twice == []
    assert outcome.equal


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_write_an_actor_and_the_clocks_fail(tmp_path):
    command = [sys.executable, "experiments/chaos.py", "--smoke", "--storage", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    runs = read_json(tmp_path / "chaos" / "chaos.json")["runs"]
    assert [run["faults"] for run in runs] == [{"storage": 1}, {"actor": 1}, {"clock": 1}]
    assert all(run["equal"] and not run["ran_twice"] for run in runs)
    assert runs[1]["repeated_macs"] < runs[1]["macs"]

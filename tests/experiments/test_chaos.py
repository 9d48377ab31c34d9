"""The experiment with faults: what it counts, and short forms of it."""

import subprocess
import sys
from collections.abc import Mapping
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
@pytest.mark.parametrize(("work", "name"), [("run", "chaos"), ("pool", "chaos-pool")])
def test_a_write_an_actor_and_the_clocks_fail(tmp_path, work, name):
    command = [sys.executable, "experiments/chaos.py", "--smoke", "--work", work]
    command += ["--storage", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    runs = read_json(tmp_path / name / f"{name}.json")["runs"]
    assert [run["faults"] for run in runs] == [{"storage": 1}, {"actor": 1}, {"clock": 1}]
    assert all(run["equal"] and not run["ran_twice"] for run in runs)
    assert runs[1]["repeated_macs"] < runs[1]["macs"]


def say_nothing(_metrics: Mapping[str, float], _step: int) -> None:
    """Report to nobody."""


def test_what_is_disturbed_ends_with_the_same_value_wherever_it_was_cut(
    importable, tmp_path, monkeypatch
):
    import chaos_work

    monkeypatch.setattr(chaos_work, "SECONDS_OF_A_STEP", 0.0)
    whole = chaos_work.work(chaos_work.Job(5, tmp_path / "whole.json"), say_nothing)
    cut = chaos_work.Job(5, tmp_path / "cut.json", megabytes=1)

    def fail(_metrics: Mapping[str, float], step: int) -> None:
        if step == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        chaos_work.work(cut, fail)
    assert read_json(cut.checkpoint)["step"] == 3
    less = chaos_work.with_less(cut)
    assert less.megabytes == 0
    assert chaos_work.with_less(less) is None
    assert chaos_work.work(less, say_nothing) == whole
    assert chaos_work.work(chaos_work.Job(6, tmp_path / "other.json"), say_nothing) != whole

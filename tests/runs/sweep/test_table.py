from dataclasses import replace

import pytest

from tdc_ray.config.run import RunConfig
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.runs.results import save_results
from tdc_ray.runs.sweep.results import TrialFinished, load_sweep, open_results
from tdc_ray.runs.sweep.space import ALIASES, Choices
from tdc_ray.runs.sweep.table import SweepTable
from tdc_ray.runs.sweep.trial import FAILED_FILE
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir
from tests.runs.test_results import RESULTS

CONFIG, SPACE = RunConfig(), {"plan.num_groups": Choices((2, 4))}
TWO, FOUR = {"plan.num_groups": 2}, {"plan.num_groups": 4}


@pytest.fixture
def events():
    return []


@pytest.fixture
def open_table(tmp_path, events):
    """Opens the table of the same sweep, as a first call and its repeats do."""
    how = SweepConfig(seeds=(0, 1))
    return lambda: SweepTable(
        tmp_path, CONFIG, open_results(tmp_path, CONFIG, SPACE, how), events.append
    )


def statuses(folder):
    return {row.name: row.status for row in load_sweep(folder).rows}


def test_every_change_of_a_row_is_written(open_table, tmp_path):
    table = open_table()
    assert statuses(tmp_path) == {}
    table.start(TWO, [0, 1])
    assert statuses(tmp_path) == {"N=2,seed=0": "running", "N=2,seed=1": "running"}
    table.end(TWO, [0], "stopped", "its base learnt worse")
    assert statuses(tmp_path)["N=2,seed=0"] == "stopped"
    assert table.remaining_seeds(TWO, (0, 1)) == [1]
    assert table.remaining_seeds(FOUR, (0, 1)) == [0, 1]


def test_a_row_with_results_is_done_whatever_ended_its_trial(open_table, tmp_path, events):
    table = open_table()
    table.start(TWO, [0])
    save_results(RunDir(tmp_path / "trials/N=2,seed=0").results, RESULTS)
    table.end(TWO, [0], "failed")
    row = table.rows["N=2,seed=0"]
    assert (row.status, row.error, row.score) == ("done", None, RESULTS.tdc.score)
    assert (row.computed_search_macs, row.reused_search_macs) == (RESULTS.prune.search_macs, 0.0)
    settings = {"k": CONFIG.plan.min_macs_share, "schedule": "snr", "proxy": CONFIG.prune.method}
    named = {ALIASES.get(name, name): value for name, value in events[0].settings.items()}
    assert events == [TrialFinished(events[0].settings, row)]
    assert named == {**settings, "N": 2}
    assert table.results.pareto == ("N=2",)


def test_a_failed_row_says_why_in_this_call_of_the_sweep(open_table, tmp_path):
    table = open_table()
    path = tmp_path / "trials/N=2,seed=0" / FAILED_FILE
    for session, error in ((table.session, "the loss is nan"), ("earlier", "its process died; ")):
        write_json(path, {"session": session, "error": "the loss is nan", "is_ours": True})
        table.end(TWO, [0], "failed")
        assert table.rows["N=2,seed=0"].error.startswith(error)


def test_a_run_that_ended_after_its_driver_is_completed_by_the_next_call(
    open_table, tmp_path, events
):
    open_table().start(TWO, [0, 1])
    save_results(RunDir(tmp_path / "trials/N=2,seed=1").results, replace(RESULTS, seed=1))
    assert not events
    again = open_table()
    assert statuses(tmp_path) == {"N=2,seed=0": "running", "N=2,seed=1": "done"}
    assert [event.row.seed for event in events] == [1]
    assert again.remaining_seeds(TWO, (0, 1)) == [0]

"""A sweep whose driver is killed: the same command ends with the results of uninterrupted,
separate runs."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from tdc_ray.errors import StorageError, WorkFailedError
from tdc_ray.reporting.hparams import metrics_of
from tdc_ray.runs.collect_results import item_results
from tdc_ray.runs.results import comparable, load_results
from tdc_ray.runs.sweep.results import load_sweep
from tdc_ray.runs.sweep.study import open_storage
from tdc_ray.runs.sweep.table import started_row
from tdc_ray.storage.files import read_json
from tdc_ray.storage.run_dir import RunDir
from tests.small import small_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NAMES = ["k=0.5,seed=0", "k=0.6,seed=0"]


def command(folder: Path, cache_dir: Path) -> list[str]:
    words = "sweep --preset digits-smoke --vary plan.min_macs_share=0.5,0.6 --compute.num-actors 1"
    places = ["--storage", str(folder), "--name", "k", "--evaluate.cache-dir", str(cache_dir)]
    return [sys.executable, "-m", "tdc_ray", *words.split(), *places]


@pytest.fixture(scope="module")
def swept(cache_dir, tmp_path_factory):
    """A sweep that was killed in its middle and then ended; and what the last call printed."""
    folder = tmp_path_factory.mktemp("sweep")
    log = folder / "log"
    with log.open("wb") as file:
        driver = subprocess.Popen(command(folder, cache_dir), stdout=file, stderr=file)
        while not list(folder.glob("k/trials/*/groups/*/round-0-*.json")):
            assert driver.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        driver.kill()
        driver.wait()
    assert {row.status for row in load_sweep(folder / "k").rows} == {"running"}
    again = subprocess.run(command(folder, cache_dir), check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    return folder / "k", again.stdout


@pytest.mark.slow
def test_what_is_shared_changes_no_result(swept, finished_run):
    folder, _ = swept
    for name, k in zip(NAMES, (0.5, 0.6), strict=True):
        results = load_results(folder / "trials" / name / "results.json")
        assert results.plan.k == k
    alone = comparable(load_results(finished_run / "results.json"))
    assert comparable(load_results(folder / "trials" / NAMES[0] / "results.json")) == alone


@pytest.mark.slow
def test_no_key_is_computed_twice_and_the_macs_add_up(swept):
    folder, _ = swept
    computed: dict[str, dict] = {}
    for name in NAMES:
        results = item_results(RunDir(folder / "trials" / name))
        assert sum(result.cached is not None for result in results) > 10
        for result in results:
            if result.cached and not result.cached.reused:
                assert result.cached.key not in computed
                computed[result.cached.key] = result.value
    rows = load_sweep(folder).rows
    spent = sum(result.get("train_macs", 0) for result in computed.values())
    assert sum(row.computed_train_macs for row in rows) == pytest.approx(spent)
    for row in rows:
        assert row.train_macs == pytest.approx(row.computed_train_macs + row.reused_train_macs)
        assert row.search_macs == pytest.approx(row.computed_search_macs + row.reused_search_macs)
    base = read_json(folder / "trials" / NAMES[0] / "base" / "result.json")["train_macs"]
    assert sum(row.reused_train_macs for row in rows) >= base


@pytest.mark.slow
def test_curves_of_what_was_shared_are_those_of_every_trial(swept):
    folder, _ = swept
    curves = []
    for name in NAMES:
        events = EventAccumulator(str(folder / "trials" / name / "tensorboard" / "base")).Reload()
        curves.append([(event.step, event.value) for event in events.Scalars("train/loss")])
    assert curves[0] == curves[1]
    assert curves[0][-1][0] == 60


@pytest.mark.slow
def test_the_table_has_a_row_a_run_and_the_log_says_what_was_shared(swept):
    folder, printed = swept
    sweep = load_sweep(folder)
    assert [row.name for row in sweep.rows] == NAMES
    assert {row.status for row in sweep.rows} == {"done"}
    best = min(sweep.rows, key=lambda row: row.score)
    assert sweep.pareto == (best.setting,)
    assert f"{sweep.computed_share:.0%}" in printed
    assert re.search(r"[012] of 2 runs done, [12] running.* s so far", printed)


@pytest.mark.slow
def test_the_same_command_runs_nothing_again(swept, ray_cluster, smoke_config):
    from tdc_ray.config.sweep import SweepConfig
    from tdc_ray.runs.sweep.space import Choices
    from tdc_ray.runs.sweep.sweep import sweep

    folder, _ = swept
    config = replace(smoke_config, compute=replace(smoke_config.compute, num_actors=1))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/**/*.json")}
    results = sweep(config, {"plan.min_macs_share": Choices((0.5, 0.6))}, SweepConfig(), folder)
    assert results.rows == load_sweep(folder).rows
    assert {path: path.stat().st_mtime_ns for path in folder.glob("trials/**/*.json")} == before


@pytest.mark.slow
def test_trials_that_learn_worse_are_stopped_and_failed_ones_told(
    ray_cluster, cache_dir, tmp_path
):
    from tdc_ray.config.sweep import SweepConfig
    from tdc_ray.runs.sweep.space import Choices
    from tdc_ray.runs.sweep.sweep import sweep

    config = small_config(
        base={"num_steps": 20, "log_every": 2, "checkpoint_every": 10},
        finetune={"num_steps": 1},
        prune={"method": "none"},
        evaluate={"num_images": 10, "batch_size": 10, "cache_dir": str(cache_dir)},
        compute={"num_actors": 1},
    )
    space = {"base.learning_rate": Choices((1e-3, 1e-9, 1e30))}  # one learns nothing, one diverges
    how = SweepConfig(stop_early=True, max_concurrent=1)
    with pytest.raises(WorkFailedError, match=r"learning_rate=1e\+30,seed=0.*loss"):
        sweep(config, space, how, tmp_path / "sweep")
    results = load_sweep(tmp_path / "sweep")
    stopped, done, failed = results.rows
    assert (stopped.status, done.status, failed.status) == ("stopped", "done", "failed")
    assert "learnt worse" in str(stopped.error)
    assert "the loss is nan" in str(failed.error)
    assert results.computed_share is None
    log = (tmp_path / "sweep" / failed.run_dir / "run.log").read_text()
    assert "Traceback" in log


def test_an_error_from_outside_is_told_with_its_traceback_and_tried_again(ray_cluster, tmp_path):
    from tdc_ray.runs.sweep.trial import FAILED_FILE, TrialSpec, failure_of, run_trial

    params = {"nowhere.field": 1}
    run_dir = tmp_path / started_row(params, 0).run_dir
    spec = TrialSpec(
        folder=tmp_path,
        config=small_config(),
        store=tmp_path / "store",
        seeds=(0,),
        stop_early=False,
        session="now",
    )
    for attempt in (1, 2):
        with pytest.raises(KeyError, match="nowhere"):
            run_trial(params, spec, lambda _metrics: None)
        assert not read_json(run_dir / FAILED_FILE)["is_ours"]
        assert failure_of(run_dir, "now") == "KeyError: 'nowhere'"
        assert (run_dir / "run.log").read_text().count("Traceback") == attempt


@pytest.mark.slow
def test_optuna_goes_on_with_its_study_in_a_file_and_a_database(
    ray_cluster, swept, cache_dir, tmp_path
):
    from tdc_ray.config.sweep import SweepConfig
    from tdc_ray.runs.sweep.space import Choices, Range
    from tdc_ray.runs.sweep.sweep import sweep

    folder = swept[0].parent / "tpe"
    config = small_config(
        finetune={"num_steps": 1},
        prune={"method": "none"},
        evaluate={"cache_dir": str(cache_dir)},
        compute={"num_actors": 1},
    )
    space = {"finetune.learning_rate": Range(1e-4, 1e-2, log=True)}
    how = SweepConfig(search="tpe", num_trials=1, objectives=("score", "macs"))
    store = swept[0] / "store"  # with the base
    (first,) = sweep(config, space, how, folder, store=store).rows
    results = sweep(config, space, replace(how, num_trials=2), folder, store=store)
    assert len(results.settings) == 2
    assert first in results.rows
    assert all(row.reused_train_macs >= row.base_train_macs for row in results.rows)
    study = optuna.load_study(study_name=str(folder), storage=open_storage(folder, how.study))
    assert sorted(tuple(trial.values) for trial in study.trials) == sorted(
        (row.score, row.macs) for row in results.rows
    )
    in_database = replace(how, num_trials=3, study=f"sqlite:///{tmp_path}/study.db")
    results = sweep(config, space, in_database, folder, store=store)
    study = optuna.load_study(study_name=str(folder), storage=in_database.study)
    assert len(results.settings) == len(study.trials) == 3
    with pytest.raises(StorageError, match="for score, macs"):
        sweep(config, space, replace(how, objectives=("score",)), folder, store=store)
    other = {"finetune.learning_rate": Choices((1e-3, 1e-2))}
    with pytest.raises(StorageError, match="choose another name"):
        sweep(config, other, how, folder, store=store)


@pytest.mark.slow
def test_tensorboard_reads_a_session_for_every_run_with_all_metrics(swept):
    folder, _ = swept
    runs = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(runs, str(folder))
    context = Context(TBContext(data_provider=provider, logdir=str(folder)))
    experiment = get_experiment.Handler(
        RequestContext(), context, "", api_pb2.GetExperimentRequest()
    ).run()
    names = {info.name for info in experiment.hparam_infos}
    assert names == {"k", "N", "schedule", "proxy", "seed"}
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags[0] == "sweep/fd_digits_cnn"
    assert tags[1:] == [
        f"sweep/{name}" for name in ("macs", "num_params", "search_macs", "seconds", "train_macs")
    ]
    every = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING, api_pb2.STATUS_SUCCESS]
    request = api_pb2.ListSessionGroupsRequest(allowed_statuses=every, slice_size=100)
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run()
    found = {}
    for group in groups.session_groups:
        (session,) = group.sessions
        values = {v.name.tag: v.value for v in session.metric_values}
        found[group.hparams["k"].number_value] = (session.name, values)
    for row in load_sweep(folder).rows:
        name, values = found.pop(row.params["plan.min_macs_share"])
        assert name == f"hparams/{row.name}"
        assert values == pytest.approx(metrics_of(row))
        assert len(values) == 6
    assert not found

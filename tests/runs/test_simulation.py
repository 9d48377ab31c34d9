from dataclasses import replace
from pathlib import Path

import pytest

from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.simulation import SimulationConfig
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.execution.timeline import load_history
from tdc_ray.runs.simulation import assumptions, simulate_run
from tdc_ray.storage.files import read_json
from tdc_ray.storage.run_dir import RunDir
from tests.small import small_config

CONFIG = small_config()


def test_more_workers_take_less_time_and_never_less_than_the_bound():
    simulation = SimulationConfig(workers=(1, 2, 100), macs_per_second=1e9)
    found = simulate_run(CONFIG, simulation)
    times = [one.makespan_seconds for one in found]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[2]
    assert all(one.makespan_seconds >= one.lower_bound_seconds for one in found)
    assert found[0].utilisation == pytest.approx(1.0)


def test_trials_share_the_workers():
    one, three = (
        simulate_run(CONFIG, SimulationConfig(workers=(1,), trials=trials))[0] for trials in (1, 3)
    )
    assert three.num_items == 3 * one.num_items
    assert three.makespan_seconds == pytest.approx(3 * one.makespan_seconds)


@pytest.mark.parametrize("prune", [{"method": "none"}, {"method": "taylor"}, {"memory": "own"}])
def test_every_kind_of_search_can_be_simulated(prune):
    config = small_config(prune=prune, compute={"gpus_per_actor": 1.0})
    (found,) = simulate_run(config, SimulationConfig(workers=(2,)))
    assert found.num_items > 0
    assert found.unfinished == {}


def test_a_language_model_measures_as_many_schemes_as_the_offline_proxy():
    one, both = (
        simulate_run(small_config(prune={"method": method}), SimulationConfig(workers=(1,)))[0]
        for method in ("offline", "llm")
    )
    prune = small_config(prune={"method": "llm"}).prune
    more = prune.num_rounds * prune.num_candidates
    assert both.num_items - one.num_items >= more * small_config().plan.num_groups


@pytest.mark.ray
def test_the_items_are_those_of_a_run_and_its_costs_are_taken(finished_run, smoke_config):
    spans = [
        span
        for span in load_history(RunDir(finished_run).timeline).spans
        if span.phase == "experts" and span.chain.startswith("group-")
    ]
    simulation = SimulationConfig(workers=(1,), costs=finished_run)
    (found,) = simulate_run(smoke_config, simulation)
    assert found.num_items == len(spans)
    work = sum(span.ended - span.started for span in spans)
    assert found.makespan_seconds == pytest.approx(work)
    other = replace(smoke_config, seed=smoke_config.seed + 1)
    with pytest.raises(StorageError, match=r"--costs .* has other settings: seed 0 -> 1\. Leave"):
        simulate_run(other, simulation)
    again = parse(["simulate", "--costs", str(finished_run)]).config
    assert again.evaluate == smoke_config.evaluate


def test_costs_of_a_run_that_did_nothing_are_refused(tmp_path):
    with pytest.raises(StorageError, match="has no finished item: name a run that is further"):
        simulate_run(CONFIG, SimulationConfig(costs=tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": ()}, r"simulate\.workers: .* at least 1 item.*, got \(\)"),
        ({"workers": (4, 0)}, r"simulate\.workers\.1 must be at least 1, got 0"),
        ({"macs_per_second": 0.0}, r"simulate\.macs_per_second must be greater than 0, got 0\.0"),
        ({"failures_per_hour": -1.0}, r"simulate\.failures_per_hour must be at least 0"),
        ({"trials": 0}, r"simulate\.trials must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SimulationConfig(**changes)


def test_the_command_prints_a_table_and_writes_it(tmp_path: Path, capsys):
    path = tmp_path / "simulated.json"
    flags = ["--preset", "digits-smoke", "--plan.schedule", "measured"]
    assert run_command(["simulate", *flags, "--workers", "3", "7", "--json", str(path)]) == 0
    assert [one["num_workers"] for one in read_json(path)["simulated"]] == [3, 7]
    assert read_json(path)["settings"]["finetune"]["num_steps"] == CONFIG.finetune.num_steps
    out, (note,) = capsys.readouterr().out, read_json(path)["notes"]
    assert "at 1e+12 macs per second" in out
    assert note.startswith("every group's limit is the mean: plan.schedule measured")
    assert note in out


def test_what_is_assumed_of_shared_budgets_is_said():
    assert assumptions(CONFIG) == []
    (note,) = assumptions(small_config(finetune={"allocation": "excess"}))
    assert note.startswith("all fine-tunes are alike: finetune.allocation excess")

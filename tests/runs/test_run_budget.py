"""Whole runs whose network and steps follow from the data and a budget."""

import json
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from tdc_ray.cli.run import run
from tdc_ray.config.budget import BudgetConfig
from tdc_ray.config.run import from_json
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.reporting.loggers.clients import CLIENTS
from tdc_ray.reporting.sinks import default_sinks
from tdc_ray.runs import run as run_module
from tdc_ray.runs.budget import with_scaled_steps
from tdc_ray.runs.results import comparable
from tdc_ray.storage.files import read_json, write_json
from tdc_ray.storage.run_dir import RunDir
from tests.small import TINY, sizes

pytestmark = pytest.mark.ray


class Client:
    """A tracker that keeps settings alone."""

    run_id = "1"

    def __init__(self, kept, *_):
        self.settings = kept.append

    scalars = image = text = summary = close = lambda *_: None


@pytest.fixture
def quick(smoke_config):
    """Settings without a search, whose images are few."""
    return replace(
        smoke_config,
        prune=replace(smoke_config.prune, method="none"),
        finetune=replace(smoke_config.finetune, num_steps=6),
        evaluate=replace(smoke_config.evaluate, num_images=16, batch_size=16),
    )


@pytest.mark.slow
def test_steps_are_timed_before_settings_are_written_and_kept_by_a_resume(
    quick, tmp_path, monkeypatch
):
    config = replace(quick, budget=BudgetConfig(hours=2))
    run_dir = RunDir(tmp_path / "run")
    calls = []

    def few(config, timing, elapsed):
        assert not run_dir.config.exists()
        calls.append((timing, elapsed))
        return with_scaled_steps(config, 0.2), timing

    monkeypatch.setattr(run_module, "steps_by_time", few)
    write_json(run_dir.features, {"features": "inception"})  # of a call that was cut, too
    settings = []
    monkeypatch.setitem(CLIENTS, "wandb", partial(Client, settings))
    sinks = default_sinks(run_dir, Console(quiet=True), ["wandb"])
    results = run_module.run(config, run_dir.root, sinks)
    assert [found["base.num_steps"] for found in settings] == [12]
    assert read_json(run_dir.features) == {"features": "classifier"}
    ((timing, elapsed),) = calls
    assert timing.training > 0
    assert timing.starts > 30
    assert elapsed > 0
    assert {path.stem for path in run_dir.step_times.iterdir()} >= {"base", "expert-0"}
    assert results.base.train_steps == 12
    assert [group.train_steps for group in results.groups] == [1] * 4
    recorded = from_json(read_json(run_dir.config))
    assert (recorded.base.num_steps, recorded.finetune.num_steps) == (12, 1)
    assert recorded.budget == config.budget
    assert recorded.compute == config.compute  # how many GPUs there are may change

    run_dir.results.unlink()  # as if it had been cut just before
    again = run(config, run_dir.root, Console(quiet=True))
    assert len(calls) == 1
    assert comparable(again) == comparable(results)


@pytest.mark.slow
def test_a_network_from_a_file_is_trained_for_epochs(quick, tmp_path):
    path = tmp_path / "unet.json"
    path.write_text(json.dumps({**TINY, "layers_per_block": 2}))
    config = replace(
        quick,
        model=replace(quick.model, config=str(path)),
        budget=BudgetConfig(epochs=0.2),
    )
    run_dir = RunDir(tmp_path / "run")
    results = run(config, run_dir.root, Console(quiet=True))
    assert results.base.train_steps == -(-0.2 * 1797 // 32)
    assert results.base.num_params == sizes({**TINY, "layers_per_block": 2})[0]
    path.unlink()
    assert run(config, run_dir.root, Console(quiet=True)) == results


@pytest.mark.slow
def test_the_architecture_that_is_chosen_is_trained(quick, tmp_path):
    config = replace(
        quick,
        model=replace(quick.model, architecture="auto", depth=1),
        base=replace(quick.base, num_steps=3),
        finetune=replace(quick.finetune, num_steps=0),
    )
    results = run(config, tmp_path / "run", Console(quiet=True))
    assert results.base.num_params == sizes({**architecture("digits"), "layers_per_block": 1})[0]

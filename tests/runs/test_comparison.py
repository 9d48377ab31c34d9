"""``tdc-ray run --compare equal-macs``: the base trained on, beside TDC."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.cli.run import run
from tdc_ray.config.compare import CompareConfig
from tdc_ray.config.run import RunConfig, default_run_dir, differences, from_json
from tdc_ray.errors import ConfigError
from tdc_ray.execution.timeline import load_history
from tdc_ray.runs.comparison import is_compared
from tdc_ray.runs.results import comparable, load_results
from tdc_ray.storage.run_dir import RunDir
from tests.small import small_config

COMPARED = {"kind": "equal-macs", "num_images": 180, "swaps": True}


@pytest.fixture(scope="module")
def compared(finished_run, smoke_config, tmp_path_factory):
    """A run that was finished, and then asked for the comparison; what it had before."""
    folder = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(finished_run, folder)
    config = replace(smoke_config, compare=CompareConfig(**COMPARED))
    return folder, config, run(config, folder, Console(quiet=True))


@pytest.mark.slow
@pytest.mark.ray
def test_a_finished_run_is_compared_later_and_nothing_else_of_it_changes(compared, finished_run):
    folder, config, results = compared
    before = load_results(finished_run / "results.json")
    assert comparable(replace(results, comparison=None)) == comparable(before)
    assert results.seconds == before.seconds
    assert load_results(folder / "results.json") == results
    assert json.loads((folder / "config.json").read_text())["compare"] == COMPARED
    earlier = len(load_history(finished_run / "timeline.jsonl").spans)
    items = [span.item for span in load_history(folder / "timeline.jsonl").spans][earlier:]
    assert {item.partition("/")[0] for item in items} == {
        "longer-base",
        "evaluate-longer-base",
        *(f"evaluate-swap-{group.index:02d}" for group in results.groups),
    }
    assert len(items) == len(set(items))
    assert run(config, folder, Console(quiet=True)) == results
    plain = replace(config, compare=CompareConfig())
    assert run(plain, folder, Console(quiet=True)) == results


@pytest.mark.slow
@pytest.mark.ray
def test_the_base_is_trained_on_by_all_that_tdc_spent(compared, smoke_config):
    _, _, results = compared
    found, base, tdc = results.comparison, results.base, results.tdc
    spent = tdc.train_macs + results.prune.search_macs
    step = 3 * base.macs * smoke_config.base.batch_size
    assert 0 <= found.train_macs - spent < step
    assert found.train_macs == step * found.steps
    assert found.steps > base.train_steps
    assert found.continued
    assert found.score < base.score


@pytest.mark.slow
@pytest.mark.ray
def test_its_losses_and_swaps_are_of_every_group(compared):
    folder, _, results = compared
    found, indices = results.comparison, [group.index for group in results.groups]
    assert [group.index for group in found.groups] == indices
    assert [swap.index for swap in found.swaps] == indices
    assert (found.num_images, found.num_noised) == (90, 180)
    for group in found.groups:
        assert group.low < group.difference < group.high
        assert group.difference == pytest.approx(group.loss_tdc - group.loss_base)
    sizes = np.array([1 + group.timesteps[1] - group.timesteps[0] for group in results.groups])
    mean = np.dot(sizes, [group.loss_tdc for group in found.groups]) / sizes.sum()
    assert found.mean.loss_tdc == pytest.approx(mean)
    images = [
        np.load(RunDir(folder).samples / name / "0000000.npz")["arr_0"]
        for name in ("longer-base", "swap-00", "tdc")
    ]
    assert not any(np.array_equal(images[0], other) for other in images[1:])


@pytest.mark.slow
@pytest.mark.ray
def test_it_is_shown_with_all_costs_in_console_and_report(compared, tmp_path, capsys):
    folder, _, results = compared
    found, spent = results.comparison, results.tdc.train_macs + results.prune.search_macs
    assert run_command(["status", str(folder)]) == 0
    printed = capsys.readouterr().out
    for figure in (results.prune.search_macs, results.tdc.train_macs, found.train_macs):
        assert f"{figure:.2e}" in printed
    for macs in (results.tdc.train_macs, spent, found.train_macs):
        assert f"{macs / results.base.train_macs:.2f}" in printed
    assert f"At equal macs: the base trained on by {found.steps - 60} steps" in printed
    assert "carried on from stage 1" in printed
    assert "--prune.held-out-of-base leaves them out" in printed.replace("\n", " ")
    assert "losses of TDC and of the base trained on" in printed
    assert run_command(["report", str(folder), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## At equal macs" in text
    assert f"| base trained on | {found.score:.3f} |" in text
    for group in found.groups:
        assert f"| {group.loss_tdc:#.4g} | {group.loss_base:#.4g} |" in text
    for swap in found.swaps:
        assert f"| {swap.score:.3f} |" in text
    models = (tmp_path / "tables" / "models.csv").read_text()
    assert "search macs" in models
    assert str(results.prune.search_macs) in models


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_kill_while_the_base_trains_on_changes_no_result(compared, finished_run, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(finished_run, folder)
    config = from_json(json.loads((finished_run / "config.json").read_text()))
    command = [sys.executable, "-m", "tdc_ray", "run", "--preset", "digits-smoke"]
    command += ["--evaluate.cache-dir", config.evaluate.cache_dir, "--run-dir", str(folder)]
    command += ["--compare", "equal-macs", "--compare.num-images", "180", "--compare.swaps"]
    with log.open("ab") as out:
        driver = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        while not (folder / "comparison" / "base.pt").exists():
            assert driver.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
        driver.kill()
        driver.wait()
        assert not (folder / "comparison" / "base.json").exists()
        assert subprocess.run(command, stdout=out, stderr=out).returncode == 0
    assert comparable(load_results(folder / "results.json")) == comparable(compared[2])
    assert not (folder / "comparison" / "base.pt").exists()


def test_what_is_compared_makes_no_other_run():
    asked = RunConfig(compare=CompareConfig(kind="equal-macs"))
    assert differences(RunConfig(), asked) == []
    assert default_run_dir(asked) == default_run_dir(RunConfig())


def test_the_flag_has_a_short_name():
    command = parse(["run", "--preset", "digits", "--compare", "equal-macs"])
    assert command.config.compare == CompareConfig(kind="equal-macs")


def test_settings_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match=r"compare\.swaps must be False with compare\.kind none"):
        CompareConfig(swaps=True)
    rule = (
        r"num_base_workers must be at most compute\.num_actors = 1 with compare\.kind equal-macs"
    )
    workers = {"num_base_workers": 2, "num_actors": 1}
    with pytest.raises(ConfigError, match=rule):
        small_config(compute=workers, compare={"kind": "equal-macs"})
    assert small_config(compute=workers).compare.kind == "none"


@pytest.mark.slow
@pytest.mark.ray
def test_results_that_lack_what_is_asked_for_are_not_taken_for_it(compared):
    _, _, results = compared
    plain = replace(results, comparison=None)
    no_swaps = replace(results, comparison=replace(results.comparison, swaps=()))
    asked = CompareConfig(**COMPARED)
    assert is_compared(results, asked)
    assert is_compared(plain, CompareConfig())
    assert is_compared(no_swaps, replace(asked, swaps=False))
    for other in (plain, no_swaps):
        assert not is_compared(other, asked)
    assert not is_compared(results, replace(asked, num_images=181))

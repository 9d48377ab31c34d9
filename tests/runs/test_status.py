import os
import shutil

import pytest

from tdc_ray.cli.main import run_command
from tdc_ray.config.run import to_json
from tdc_ray.errors import StorageError
from tdc_ray.execution.item import ItemResult
from tdc_ray.execution.timeline import Timeline
from tdc_ray.runs.stages.base_result import STEP_FILE, BaseResult
from tdc_ray.runs.status import start_status, status
from tdc_ray.storage.files import write_json
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.run_dir import RunDir
from tests.small import small_config


@pytest.mark.ray
def test_a_finished_run_is_told_with_its_groups_workers_and_scores(finished_run, capsys):
    found = status(RunDir(finished_run))
    assert found.results is not None
    assert found.running == []
    assert all(group.loss_finetuned is not None for group in found.groups)
    assert all(group.failed is None for group in found.groups)
    assert [part.phase for part in found.usage] == ["experts", "times", "evaluation"]
    assert found.usage == list(found.results.workers)
    for group, reported in zip(found.groups, found.results.groups, strict=True):
        assert group.best_loss == (reported.loss_refit if group.num_candidates else None)
    for part in found.usage:
        assert 0 < part.utilisation <= 1
        assert part.makespan_seconds >= part.lower_bound_seconds > 0
    assert (finished_run / "timeline.png").stat().st_size > 1000
    assert run_command(["status", str(finished_run)]) == 0
    assert "experts: " in capsys.readouterr().out


@pytest.mark.ray
def test_a_run_that_was_cut_is_told_as_far_as_it_came(finished_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    (folder / "results.json").unlink()
    for path in (folder / "groups" / "01").glob("finetune-*.json"):
        path.unlink()
    lines = (folder / "timeline.jsonl").read_text().splitlines(keepends=True)
    (folder / "timeline.jsonl").write_text("".join(lines[: len(lines) // 2]))
    found = status(RunDir(folder))
    assert found.results is None
    assert found.driver is None
    with hold_lease(folder):
        assert f"process {os.getpid()} on host" in status(RunDir(folder)).driver
    assert [group.index for group in found.groups if group.loss_finetuned is None] == [1]
    timeline = Timeline(folder / "timeline.jsonl")
    timeline.add("failed", chain="group-02", reason="it diverged")
    timeline.add("failed", chain="tdc/0000100", reason="[disk] full")
    timeline.flush()
    assert run_command(["status", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "not finished; the command that began it resumes it" in printed
    assert status(RunDir(folder)).groups[2].failed == "it diverged"
    assert "failed: tdc/0000100: [disk] full" in printed


def test_stage_1_is_told_by_its_steps(tmp_path):
    config, run_dir = small_config(), RunDir(tmp_path)
    total = config.base.num_steps
    write_json(run_dir.config, to_json(config))
    assert status(run_dir).base == f"no checkpoint yet of {total} steps"
    for number, step in enumerate((10, 20)):
        write_json(run_dir.base_training / f"checkpoint_{number}" / STEP_FILE, {"step": step})
    assert status(run_dir).base == f"step 20 of {total} is kept"
    (run_dir.base_training / "checkpoint_1" / STEP_FILE).rename(
        run_dir.base_training / "checkpoint_1" / "state.pt"
    )
    assert status(run_dir).base.startswith("a checkpoint is kept (one every ")
    ItemResult(BaseResult(1, 1, total, 1.0, 7.0)).save(run_dir.base_result)
    assert status(run_dir).base == f"done: {total} steps in 7 s"
    write_json(run_dir.base_result, {"seconds": 7.0})
    with pytest.raises(StorageError, match=r"result\.json is no result of this item"):
        status(run_dir)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "run.log").touch()  # as a run that was refused leaves it
    with hold_lease(tmp_path):  # as a sweep has it
        assert start_status(RunDir(tmp_path)) is None
    with pytest.raises(StorageError, match=r"is no run directory: it has no config\.json"):
        status(RunDir(tmp_path))


def test_a_run_whose_steps_are_timed_is_told_before_it_has_settings(tmp_path, capsys):
    with hold_lease(tmp_path):
        timeline = Timeline(tmp_path / "timeline.jsonl")
        item = {"chain": "base", "stage": 0, "item": "step-times/base", "attempt": 1}
        timeline.add("start", task=0, workers=["worker 0"], **item)
        timeline.flush()
        assert run_command(["status", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
    assert "starting: settings are written once" in printed
    assert f"driver: process {os.getpid()} on host" in printed
    assert "under way: step-times/base on worker 0, for 0 s" in printed
    assert run_command(["status", str(tmp_path)]) == 0
    assert (
        "driver: none; the command that began the run begins it again" in capsys.readouterr().out
    )

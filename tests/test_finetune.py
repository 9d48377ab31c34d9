import dataclasses
import json
from pathlib import Path

import pytest

from tdc_ray.config import RunConfig
from tdc_ray.finetune import Expert, expert_dir, make_expert
from tdc_ray.layout import RunDir
from tdc_ray.models.experts import load_expert
from tdc_ray.models.surgery import cut
from tdc_ray.models.unet import count_macs, count_params, load_unet
from tdc_ray.prune.measure import held_out_loss
from tdc_ray.prune.memory import MemoryBank
from tdc_ray.prune.rounds import GroupTask
from tdc_ray.work import Report, run_chain
from tests.small import assert_same, make_run_dir, small_config, task_of, widths_of

NUM_STEPS = 5


def config_of(*, method: str = "magnitude", **finetune: int) -> RunConfig:
    """Five steps of 8 images, with a checkpoint after every second."""
    steps = {"num_steps": NUM_STEPS, "batch_size": 8, "checkpoint_every": 2, "log_every": 1}
    return small_config(
        model={"dropout": 0.2},
        prune={"method": method, "num_images": 16, "num_rounds": 1, "num_candidates": 2},
        finetune={**steps, **finetune},
    )


def ignore(_metrics, _step):
    pass


def make(task: GroupTask, report: Report = ignore) -> Expert:
    return run_chain(make_expert(task, MemoryBank(task.run_dir.memory)), report)


def timeless(expert: Expert) -> Expert:
    choice = dataclasses.replace(expert.choice, seconds=0.0)
    return dataclasses.replace(expert, choice=choice, seconds=0.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> GroupTask:
    return task_of(make_run_dir(tmp_path_factory.mktemp("whole")), config_of())


@pytest.fixture(scope="module")
def expert(task) -> Expert:
    """The expert of the least noisy group, made without a break."""
    return make(task)


def test_the_saved_expert_has_the_macs_parameters_and_loss_that_are_told(task, expert):
    saved = load_expert(expert_dir(task.run_dir, task.group))
    assert expert.macs == count_macs(saved) <= expert.max_macs
    assert expert.num_params == count_params(saved)
    assert expert.loss_finetuned == held_out_loss(saved, task.config, task.group)
    assert expert.group == task.group
    assert expert.max_macs == task.max_macs


def test_the_cost_is_three_forward_passes_for_every_image_seen(task, expert):
    assert expert.train_steps == NUM_STEPS
    assert expert.train_macs == 3 * expert.macs * NUM_STEPS * 8
    assert expert.seconds > 0


def test_a_longer_training_lowers_the_loss_after_the_cut(tmp_path):
    config = config_of(num_steps=30, checkpoint_every=30)
    config = dataclasses.replace(
        config, finetune=dataclasses.replace(config.finetune, learning_rate=2e-3, ema_decay=0.5)
    )
    found = make(task_of(make_run_dir(tmp_path), config))
    assert found.loss_finetuned < 0.9 * found.choice.loss_cut


def test_a_finished_expert_leaves_no_checkpoint_behind(task, expert):
    folder = task.run_dir.group(task.group.index)
    assert {path.suffix for path in folder.iterdir()} == {".json"}
    told = json.loads((folder / "finetune.json").read_text())
    assert told["loss_finetuned"] == expert.loss_finetuned


def test_a_finished_expert_is_not_made_again(task, expert):
    weights = expert_dir(task.run_dir, task.group) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    reports = []
    assert make(task, lambda metrics, step: reports.append((metrics, step))) == expert
    assert weights.stat().st_mtime_ns == written
    assert reports == []


def test_making_the_expert_again_gives_the_same_one(task, expert, tmp_path):
    again = dataclasses.replace(task, run_dir=make_run_dir(tmp_path))
    assert timeless(make(again)) == timeless(expert)
    assert_same(weights_of(again), weights_of(task))


class KilledError(Exception):
    """Stands for whatever ends a worker."""


def kill_at(step: int) -> Report:
    def report(metrics, at):
        if "grad_norm" in metrics and at == step:
            raise KilledError

    return report


def weights_of(task: GroupTask) -> dict:
    return load_expert(expert_dir(task.run_dir, task.group)).state_dict()


def checkpoint_of(task: GroupTask) -> Path:
    return task.run_dir.group(task.group.index) / "checkpoint.pt"


@pytest.mark.parametrize("steps", [[1], [3], [4, 5], [3, 3, 5]], ids=str)
def test_killed_in_the_middle_and_started_again_gives_the_same_expert(
    task, expert, tmp_path, steps
):
    again = dataclasses.replace(task, run_dir=make_run_dir(tmp_path))
    for step in steps:
        with pytest.raises(KilledError):
            make(again, kill_at(step))
        assert checkpoint_of(again).exists() == (step > 2)
        assert not expert_dir(again.run_dir, again.group).exists()
    seen = []
    found = make(again, lambda metrics, at: seen.append(at) if "grad_norm" in metrics else None)
    assert seen == list(range((steps[-1] - 1) // 2 * 2 + 1, NUM_STEPS + 1))  # not from the start
    assert timeless(found) == timeless(expert)
    assert_same(weights_of(again), weights_of(task))
    assert not checkpoint_of(again).exists()


def test_killed_after_saving_and_before_its_result_gives_the_same_expert(task, expert, tmp_path):
    again = dataclasses.replace(task, run_dir=make_run_dir(tmp_path))
    make(again)
    (again.run_dir.group(0) / "finetune.json").unlink()
    assert timeless(make(again)) == timeless(expert)


def test_without_a_step_the_expert_is_the_cut_base(tmp_path):
    task = task_of(make_run_dir(tmp_path), config_of(num_steps=0))
    expert = make(task)
    expected = cut(load_unet(task.run_dir.base_unet), task.space.units, expert.choice.kept)
    assert_same(weights_of(task), expected.state_dict())
    assert expert.loss_finetuned == expert.choice.loss_cut
    assert (expert.train_steps, expert.train_macs) == (0, 0)


def test_without_pruning_and_without_a_step_the_expert_is_the_base(tmp_path):
    task = task_of(make_run_dir(tmp_path), config_of(method="none", num_steps=0))
    expert = make(task)
    assert_same(weights_of(task), load_unet(task.run_dir.base_unet).state_dict())
    assert expert.loss_finetuned == expert.choice.loss_base
    assert expert.macs == task.space.macs_base


def test_only_the_groups_own_expert_is_written(task, expert):
    run_dir: RunDir = task.run_dir
    assert [path.name for path in run_dir.experts.iterdir()] == ["expert-00"]
    assert widths_of(expert.choice.kept) == dict(expert.choice.widths)

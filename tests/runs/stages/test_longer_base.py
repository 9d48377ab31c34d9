"""The base trained on: a continuation of stage 1, resumable, on the images of fine-tunes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import distributed

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import FinetuneConfig
from tdc_ray.data.batches import held_out_split
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.sharding import sharding_mesh
from tdc_ray.errors import CheckpointError
from tdc_ray.execution.cache import ResultCache, key_of
from tdc_ray.execution.device import WorkerRank
from tdc_ray.execution.item import CacheMark, ItemResult, run_item
from tdc_ray.models.unet2d.unet import load_unet, save_unet
from tdc_ray.runs.stages.base import base_item, checkpoint_of_moments, last_checkpoint
from tdc_ray.runs.stages.base_result import BaseResult
from tdc_ray.runs.stages.base_worker import STATE_FILE, train_base
from tdc_ray.runs.stages.longer_base import (
    LongerBaseJob,
    longer_base_item,
    smaller_micro_batch,
    steps_for,
    train_longer_base,
)
from tdc_ray.storage.run_dir import RunDir
from tests.small import TINY, assert_same, group_of, make_run_dir, sizes, small_config

STEPS = {"num_steps": 4, "batch_size": 8, "checkpoint_every": 2, "num_warmup_steps": 1}


def config_of(**base: object) -> RunConfig:
    return small_config(model={"dropout": 0.2}, base={**STEPS, "log_every": 1, **base})


class KilledError(Exception):
    """Stands for a kill."""


def ignore(*_: object) -> None:
    pass


def train_stage_1(run_dir: RunDir, config: RunConfig) -> RunDir:
    """Train a base as stage 1 does, and keep its checkpoints where Ray Train does."""

    def save(state):
        folder = run_dir.base_training / f"checkpoint_{state.step:06d}"
        folder.mkdir(parents=True)
        state.save(folder / STATE_FILE)

    worker = WorkerRank(0, 1, torch.device("cpu"))
    state = train_base(
        config, worker, resume_from=None, wrap=lambda unet: unet, report=ignore, save=save
    )
    with state.ema_weights() as unet:
        save_unet(unet, run_dir.base_unet)
    (run_dir.base_training / "checkpoint_manager_snapshot.json").touch()  # as Ray Train does
    num_params, macs = sizes(TINY)
    ItemResult(BaseResult(macs, num_params, state.step, 1.0, 1.0)).save(run_dir.base_result)
    return run_dir


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RunDir:
    return train_stage_1(RunDir(tmp_path_factory.mktemp("trained")), config_of())


def train_on(source: RunDir, root: Path, *, report=ignore, continues=True, num_steps=5):
    """Train the base of one run on in another folder; give its weights and the result."""
    run_dir = RunDir(root, given_base=source.base_unet)
    checkpoint = last_checkpoint(source, None) if continues else None
    job = LongerBaseJob(run_dir, config_of(), num_steps, checkpoint)
    result = run_item(longer_base_item(job), report)
    return load_unet(run_dir.longer_base).state_dict(), result


def test_it_goes_on_with_step_optimizer_and_average(trained, tmp_path):
    steps = []
    weights, result = train_on(trained, tmp_path, report=lambda metrics, step: steps.append(step))
    assert steps == [5, 6, 7, 8, 9]  # after the four of stage 1
    assert (result.steps, result.continued) == (5, True)
    assert result.macs_spent == 3 * sizes(TINY)[1] * 5 * 8
    state = torch.load(tmp_path / "comparison" / "base.pt", weights_only=True)
    assert state["ema"]["optimization_step"] == 9
    assert {float(one["step"]) for one in state["optimizer"]["state"].values()} == {9.0}
    afresh, other = train_on(trained, tmp_path / "afresh", continues=False)
    assert not other.continued
    assert any(not torch.equal(afresh[name], value) for name, value in weights.items())


@pytest.mark.slow
def test_a_base_that_workers_share_is_trained_on_as_one_that_each_holds(
    trained, tmp_path, monkeypatch
):
    meshes = []

    def mesh_of(worker):
        meshes.append(sharding_mesh(worker))
        return meshes[-1]

    monkeypatch.setattr("tdc_ray.runs.stages.longer_base.sharding_mesh", mesh_of)
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    weights = []
    try:
        for sharding in ("none", "full"):
            run_dir = RunDir(tmp_path / sharding, given_base=trained.base_unet)
            config = dataclasses.replace(
                config_of(),
                compute=ComputeConfig(num_base_workers=2, sharding=sharding),
                finetune=FinetuneConfig(average_with_start=0.5),
            )
            job = LongerBaseJob(run_dir, config, 2, last_checkpoint(trained, None))
            train_longer_base(job, ignore)
            weights.append(load_unet(run_dir.longer_base).state_dict())
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    assert len(meshes) == 1


def test_without_a_step_it_is_the_base(trained, tmp_path):
    weights, _ = train_on(trained, tmp_path, num_steps=0)
    assert_same(weights, load_unet(trained.base_unet).state_dict())


def test_one_that_was_killed_resumes_from_its_checkpoint_to_the_same_weights(trained, tmp_path):
    whole, _ = train_on(trained, tmp_path / "whole")
    seen = []

    def killed_at_8(_metrics, step):
        seen.append(step)
        if step == 8:
            raise KilledError

    with pytest.raises(KilledError):
        train_on(trained, tmp_path / "cut", report=killed_at_8)
    assert not (tmp_path / "cut" / "comparison" / "unet").exists()
    cut, _ = train_on(trained, tmp_path / "cut", report=lambda metrics, step: seen.append(step))
    assert seen == [5, 6, 7, 8, 7, 8, 9]  # the checkpoint is of step 6
    assert_same(cut, whole)


def test_it_sees_no_image_that_is_held_out(trained, tmp_path, monkeypatch):
    drawn = set()
    config = config_of()
    dataset = load_dataset(config.data)

    class Watched:
        def __len__(self):
            return len(dataset)

        def __getitems__(self, indices):
            drawn.update(indices)
            return dataset.__getitems__(indices)

    monkeypatch.setattr("tdc_ray.data.latents.load_dataset", lambda _config: Watched())
    train_on(trained, tmp_path, num_steps=40)
    rest, held_out = held_out_split(dataset, config.prune.held_out_share, config.seed)
    assert len(drawn) == 40 * 8
    assert drawn <= set(rest)
    assert not drawn & set(held_out)


@pytest.mark.slow
def test_it_is_averaged_with_its_start_and_decays_as_fine_tunes_are(trained, tmp_path):
    def train_as(folder: Path, report=ignore, **finetune):
        config = config_of()
        config = dataclasses.replace(
            config, finetune=dataclasses.replace(config.finetune, **finetune)
        )
        run_dir = RunDir(folder, given_base=trained.base_unet)
        job = LongerBaseJob(run_dir, config, 5, last_checkpoint(trained, None))
        run_item(longer_base_item(job), report)
        return load_unet(run_dir.longer_base).state_dict()

    rates, seen = [], []
    plain, start = train_as(tmp_path / "plain"), load_unet(trained.base_unet).state_dict()
    half = train_as(tmp_path / "half", average_with_start=0.5)
    for name, value in half.items():
        torch.testing.assert_close(value, (plain[name] + start[name]) / 2)

    def killed_at_8(_metrics, step):
        seen.append(step)
        if step == 8:
            raise KilledError

    with pytest.raises(KilledError):
        train_as(tmp_path / "cut", killed_at_8, average_with_start=0.5)
    assert_same(train_as(tmp_path / "cut", average_with_start=0.5), half)
    train_as(
        tmp_path / "decaying",
        lambda metrics, _step: rates.append(metrics["learning_rate"] / 1e-3),
        lr_schedule="linear",
    )
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_checkpoint_of_another_step_is_refused(trained, tmp_path):
    job = LongerBaseJob(
        RunDir(tmp_path, given_base=trained.base_unet),
        config_of(num_steps=7),
        3,
        last_checkpoint(trained, None),
    )
    with pytest.raises(
        CheckpointError, match=r"is of step 4, expected stage 1's last, 7\. Remove"
    ):
        run_item(longer_base_item(job), ignore)


def test_the_checkpoint_of_a_base_from_a_cache_is_that_of_the_run_that_trained_it(
    trained, tmp_path
):
    cache = ResultCache(tmp_path / "store", str(trained.root))
    item = base_item(trained, config_of())
    key = key_of(item)
    value = BaseResult(1, 1, 4, 1.0, 1.0)
    cache.save(item, key, value)
    own = last_checkpoint(trained, None)
    assert own == trained.base_training / "checkpoint_000004" / STATE_FILE
    other = RunDir(tmp_path / "other")
    reusing = ResultCache(tmp_path / "store", str(other.root))
    reusing.load(base_item(other, config_of()), ignore, key=key)
    assert last_checkpoint(other, reusing) == own
    assert last_checkpoint(other, None) is None
    ItemResult(value, CacheMark("none", reused=True)).save(other.base_result)
    assert last_checkpoint(other, reusing) is None
    # A kill left one of an own training, then the base came from the cache.
    ItemResult(value, CacheMark(key, reused=True)).save(other.base_result)
    unfinished = other.base_training / "checkpoint_000002" / STATE_FILE
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    assert last_checkpoint(other, reusing) == own
    assert last_checkpoint(other, None) is None
    another = make_run_dir(tmp_path / "another")  # of other weights, under the same entry
    ItemResult(value, CacheMark(key, reused=True)).save(another.base_result)
    assert last_checkpoint(another, reusing) is None


def test_fine_tunes_that_need_a_checkpoint_are_refused_before_they_start(trained, tmp_path):
    new, config = config_of(), small_config(finetune={"optimizer_state": "base"})
    groups = [group_of(config, index) for index in range(2)]
    own = last_checkpoint(trained, None)
    assert checkpoint_of_moments(trained, config, groups, None) == own
    assert checkpoint_of_moments(trained, new, groups, None) is None
    other = make_run_dir(tmp_path)
    ItemResult(BaseResult(1, 1, 4, 1.0, 1.0)).save(other.base_result)
    other.expert(0).mkdir(parents=True)
    assert checkpoint_of_moments(other, new, groups, None) is None
    with pytest.raises(CheckpointError, match=r"optimizer_state base needs .* Use new"):
        checkpoint_of_moments(other, config, groups, None)
    other.expert(1).mkdir(parents=True)  # all experts are made
    assert checkpoint_of_moments(other, config, groups, None) is None


def test_its_key_follows_from_base_steps_and_whether_the_optimizer_goes_on(trained, tmp_path):
    job = LongerBaseJob(
        RunDir(tmp_path, given_base=trained.base_unet),
        config_of(),
        3,
        last_checkpoint(trained, None),
    )
    changes = [{}, {"num_steps": 4}, {"continues": None}, {"config": config_of(batch_size=4)}]
    keys = [key_of(longer_base_item(dataclasses.replace(job, **change))) for change in changes]
    assert len(set(keys)) == len(keys)
    elsewhere = dataclasses.replace(job, run_dir=RunDir(tmp_path / "b", trained.base_unet))
    assert key_of(longer_base_item(elsewhere)) == keys[0]


def test_short_of_memory_it_takes_half_the_images_at_once(trained):
    job = LongerBaseJob(trained, config_of(), 3, None)
    sizes_at_once = []
    while (job := smaller_micro_batch(job)) is not None:
        sizes_at_once.append(job.config.base.micro_batch_size)
    assert sizes_at_once == [4, 2, 1]


def test_its_steps_cost_no_less_than_what_was_spent():
    assert steps_for(0.0, 100, 8) == 0
    assert steps_for(3 * 100 * 8 * 5, 100, 8) == 5
    assert steps_for(3 * 100 * 8 * 5 + 1, 100, 8) == 6

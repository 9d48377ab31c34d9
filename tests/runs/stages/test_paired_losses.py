"""Losses of two models on the same images and noise, which no choice has seen."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import halves, held_out_split
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.loss import denoising_loss
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.execution.cache import key_of
from tdc_ray.execution.item import run_item
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import save_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.pruning.noised import noised_batches
from tdc_ray.runs.stages import paired_losses
from tdc_ray.runs.stages.paired_losses import (
    PairedJob,
    difference_of,
    mean_difference,
    paired_difference,
    paired_item,
    unseen_batches,
    unseen_images,
)
from tdc_ray.storage.run_dir import RunDir
from tests.small import TINY, context_of, group_of, random_kept, random_unet, small_config

UNITS = units_of(TINY)


def config_of(num_images: int = 200) -> RunConfig:
    compare = {"kind": "equal-macs", "num_images": num_images}
    return small_config(compare=compare, prune={"num_images": 512})


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> PairedJob:
    folder = tmp_path_factory.mktemp("models")
    kept, base = random_kept(UNITS, seed=0), random_unet()
    save_unet(base, folder / "unet")
    save_expert(folder / "expert", cut(base, UNITS, kept), TINY, kept)
    config = config_of()
    return PairedJob(
        config, group_of(config, 1), folder / "expert", folder / "unet", folder / "a.npy"
    )


def test_the_losses_are_those_of_both_models_on_the_same_noised_images(job):
    result = run_item(paired_item("losses", job, (1, 1)), ignore)
    assert (result.num_images, result.num_noised) == (90, 270)
    models = [paired_losses._load(folder) for folder in (job.tdc, job.base)]
    batch = NoisedBatch.join(list(unseen_batches(job.config, job.group, models)))
    schedule = noise_schedule(job.config.diffusion)
    with torch.inference_mode():
        by_noise = [denoising_loss(model, schedule, batch).double() for model in models]
    expected = torch.stack(by_noise).reshape(2, 3, 90).mean(1).numpy()
    np.testing.assert_allclose(np.load(job.path), expected, rtol=1e-4)
    found = paired_difference(job.path)
    assert found.loss_tdc == pytest.approx(expected[0].mean())
    assert found.difference == pytest.approx(found.loss_tdc - found.loss_base)
    assert found.low < found.difference < found.high


def test_a_model_beside_itself_differs_by_nothing(job, tmp_path):
    same = dataclasses.replace(job, tdc=job.base, path=tmp_path / "same.npy")
    run_item(paired_item("losses", same, (1, 1)), ignore)
    found = paired_difference(same.path)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


def pixels_of(batches) -> set[bytes]:
    return {image.numpy().tobytes() for batch in batches for image in batch.x_0}


def test_no_choice_and_no_fine_tune_has_seen_the_images(job):
    config, dataset = job.config, load_dataset(job.config.data)
    rest, held_out = held_out_split(dataset, config.prune.held_out_share, config.seed)
    chosen_by, unseen = halves(held_out)
    assert list(unseen_images(config)) == list(unseen)
    assert not set(unseen) & {*rest, *chosen_by}
    assert len(unseen) == len(chosen_by) == 90
    context, unet = context_of(RunDir(job.path.parent), config), random_unet()
    ours = pixels_of(unseen_batches(config, job.group, [unet]))
    for purpose in ("scores", "refit", "held-out"):
        theirs = pixels_of(noised_batches(context, job.group, unet, purpose=purpose))
        assert not ours & theirs, purpose


def test_every_image_comes_equally_often_with_timesteps_over_all_of_the_group(job):
    batch = NoisedBatch.join(list(unseen_batches(job.config, job.group, [random_unet()])))
    assert len(batch.x_0) == 270
    images = batch.x_0.reshape(3, 90, -1)
    assert torch.equal(images[0], images[1])
    assert len({image.numpy().tobytes() for image in images[0]}) == 90
    timesteps = job.group.timesteps
    assert timesteps.start == batch.timesteps.min()
    assert set(batch.timesteps.tolist()) <= set(timesteps)
    shares = torch.bincount(batch.timesteps - timesteps.start, minlength=len(timesteps))
    assert shares.max() - shares.min() <= 1


def test_the_number_measured_at_once_changes_no_noise(job, monkeypatch):
    whole = list(unseen_batches(job.config, job.group, [random_unet()]))
    monkeypatch.setattr(paired_losses, "max_batch_size", lambda _model: 7)
    parts = list(unseen_batches(job.config, job.group, [random_unet()]))
    assert len(parts) > len(whole)
    assert torch.equal(NoisedBatch.join(whole).epsilon, NoisedBatch.join(parts).epsilon)


def test_fewer_noised_images_than_there_are_take_so_many_once():
    assert len(unseen_images(config_of(num_images=20))) == 20


def test_the_interval_is_students_over_the_images():
    draw = np.random.default_rng(0)
    losses = draw.normal(1.0, 0.1, (2, 40))
    found = difference_of(losses)
    low, high = stats.ttest_rel(*losses).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert math.isinf(difference_of(losses[:, :1]).high)


def test_over_all_timesteps_groups_count_by_their_timesteps(tmp_path):
    config = config_of()
    groups = [group_of(config, index) for index in (0, 1)]
    draw, paths = np.random.default_rng(0), []
    losses = draw.normal(1.0, 0.1, (2, 2, 30))
    for number, one in enumerate(losses):
        paths.append(tmp_path / f"{number}.npy")
        np.save(paths[-1], one)
    shares = np.array([len(group.timesteps) for group in groups])
    expected = difference_of(np.moveaxis(losses, 0, -1) @ (shares / shares.sum()))
    found = mean_difference(paths, groups)
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(expected))


def test_the_key_follows_from_models_noise_and_number(job):
    others = [
        job,
        dataclasses.replace(job, tdc=job.base),
        dataclasses.replace(job, group=group_of(job.config, 2)),
        dataclasses.replace(job, config=config_of(num_images=100)),
    ]
    assert len({key_of(paired_item("losses", one, (1, 1))) for one in others}) == len(others)

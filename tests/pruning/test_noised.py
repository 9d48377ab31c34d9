from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import halves, held_out_split, to_minus_one_one
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.loss import denoising_loss
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.models.unet2d.unet import build_unet, load_unet
from tdc_ray.pruning.noised import noised_batches
from tdc_ray.storage.run_dir import RunDir
from tests.small import (
    TINY,
    context_of,
    group_of,
    held_out_loss_of,
    make_run_dir,
    random_unet,
    small_config,
)

UNET = random_unet()
CONDITIONED = random_unet({**TINY, "num_class_embeds": 10})
CONFIG = small_config(prune={"num_images": 64, "num_refit_images": 48})
NO_RUN = RunDir(Path("/nonexistent"))
THIRTEEN = replace(CONFIG.prune, batch_size=13)
PURPOSES = ["held-out", "scores", "refit"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    return make_run_dir(tmp_path_factory.mktemp("run"))


def drawn(config: RunConfig, index: int, *, purpose="held-out", unet=UNET) -> NoisedBatch:
    """All images of a group, batches put together."""
    found = list(
        noised_batches(context_of(NO_RUN, config), group_of(config, index), unet, purpose=purpose)
    )
    return NoisedBatch.join(found)


def numbers_of(config: RunConfig, x_0: Tensor) -> list[int]:
    """Which images of the dataset these are; digits are all different."""
    images = to_minus_one_one(load_dataset(config.data).images)
    return [(images == image).flatten(1).all(1).nonzero()[0].item() for image in x_0]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("purpose", PURPOSES)
def test_all_timesteps_of_the_noise_lie_inside_the_group(index, purpose):
    group, batch = group_of(CONFIG, index), drawn(CONFIG, index, purpose=purpose)
    count = 48 if purpose == "refit" else 64
    assert batch.x_0.shape == batch.epsilon.shape == (count, 1, 8, 8)
    assert all(timestep in group.timesteps for timestep in batch.timesteps.tolist())


@pytest.mark.parametrize("index", range(4))
def test_the_timesteps_are_spread_evenly_over_the_group(index):
    group, count = group_of(CONFIG, index), CONFIG.prune.num_images
    found = sorted(drawn(CONFIG, index).timesteps.tolist())
    size = len(group.timesteps)
    assert found == [group.first + place * size // count for place in range(count)]


def test_more_images_than_timesteps_use_every_timestep():
    config = small_config(
        prune={"num_images": 40, "batch_size": 16}, plan={"num_groups": 10, "min_group_size": 1}
    )
    group = group_of(config, 0)
    assert len(group.timesteps) == 4
    assert set(drawn(config, 0).timesteps.tolist()) == set(group.timesteps)


def test_noise_is_the_same_at_every_call_and_another_for_every_purpose_group_and_seed():
    first = drawn(CONFIG, 1)
    torch.manual_seed(99)
    again = drawn(CONFIG, 1)
    others = [
        drawn(CONFIG, 1, purpose="scores"),
        drawn(CONFIG, 1, purpose="refit"),
        drawn(CONFIG, 2),
        drawn(small_config(seed=1), 1),
    ]
    for name in ("x_0", "epsilon"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not any(
            torch.equal(getattr(first, name)[:48], getattr(other, name)[:48]) for other in others
        )


def test_images_timesteps_and_noise_do_not_depend_on_the_batches():
    whole = drawn(CONFIG, 1, unet=CONDITIONED)
    parts = drawn(replace(CONFIG, prune=THIRTEEN), 1, unet=CONDITIONED)
    for name in ("x_0", "epsilon", "timesteps", "labels"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_the_images_are_different_ones_in_model_range_with_their_labels():
    batch, dataset = drawn(CONFIG, 0, unet=CONDITIONED), load_dataset(CONFIG.data)
    numbers = numbers_of(CONFIG, batch.x_0)
    assert len(set(numbers)) == len(batch.x_0)
    assert batch.x_0.min() == -1
    assert batch.x_0.max() == 1
    assert batch.labels.tolist() == dataset.__getitems__(numbers)[1].tolist()


def test_losses_are_measured_on_images_that_nothing_else_sees():
    rest, held_out = held_out_split(
        load_dataset(CONFIG.data), CONFIG.prune.held_out_share, CONFIG.seed
    )
    numbers = {name: numbers_of(CONFIG, drawn(CONFIG, 0, purpose=name).x_0) for name in PURPOSES}
    assert set(numbers["held-out"]) <= set(halves(held_out)[0])
    assert set(numbers["scores"]) | set(numbers["refit"]) <= set(rest)


def test_held_out_images_come_again_with_other_noise_where_there_are_too_few():
    config = small_config(prune={"num_images": 64, "held_out_share": 0.02})
    batch = drawn(config, 0)
    numbers = numbers_of(config, batch.x_0)
    assert len(set(numbers)) == 18  # half of the 36 of 1,797
    assert len(torch.unique(batch.epsilon, dim=0)) == 64


def test_the_loss_is_the_mean_training_loss_over_the_held_out_images(run_dir):
    group, unet, batch = group_of(CONFIG, 1), load_unet(run_dir.base_unet), drawn(CONFIG, 1)
    schedule = noise_schedule(CONFIG.diffusion)
    with torch.no_grad():
        losses = denoising_loss(unet, schedule, batch)
    expected = pytest.approx(float(losses.mean()), rel=1e-5)
    assert held_out_loss_of(unet, CONFIG, group) == expected


def test_the_loss_is_the_mean_over_all_images_however_they_are_batched(run_dir):
    group, unet = group_of(CONFIG, 0), load_unet(run_dir.base_unet)
    whole = held_out_loss_of(unet, small_config(prune={"num_images": 48, "batch_size": 48}), group)
    parts = held_out_loss_of(unet, small_config(prune={"num_images": 48, "batch_size": 32}), group)
    assert parts == pytest.approx(whole, rel=1e-5)


def test_the_loss_is_measured_without_dropout():
    group, unet = group_of(CONFIG, 0), build_unet({**TINY, "dropout": 0.5}).train()
    assert held_out_loss_of(unet, CONFIG, group) == held_out_loss_of(unet, CONFIG, group)


def test_labels_are_given_to_unets_that_are_conditioned_on_them_alone():
    batch, schedule = drawn(CONFIG, 0, unet=CONDITIONED), noise_schedule(CONFIG.diffusion)
    plain, x_t = drawn(CONFIG, 0), batch.x_t(schedule)
    with torch.no_grad():
        expected = CONDITIONED(x_t, batch.timesteps, class_labels=batch.labels).sample
        assert torch.equal(batch.predict(CONDITIONED, schedule), expected)
        assert plain.labels is None
        assert torch.equal(plain.predict(UNET, schedule), UNET(x_t, batch.timesteps).sample)


def test_networks_that_learnt_rescaled_timesteps_see_them_rescaled():
    config = small_config(diffusion={"num_train_timesteps": 4000, "rescale_timesteps": True})
    batch, schedule = drawn(config, 3), noise_schedule(config.diffusion)
    unet = random_unet()
    x_t = schedule.add_noise(batch.x_0, batch.epsilon, batch.timesteps)
    with torch.no_grad():
        expected = unet(x_t, batch.timesteps / 4).sample
        torch.testing.assert_close(batch.predict(unet, schedule), expected)
    assert batch.timesteps.max() >= 1000

import math

import pytest
import torch

from tdc_ray.data import to_model_range
from tdc_ray.datasets import load_dataset
from tdc_ray.layout import RunDir
from tdc_ray.models.unet import build_unet, load_unet
from tdc_ray.models.units import keep_all, units_of
from tdc_ray.prune.importance import magnitude_scores
from tdc_ray.prune.measure import (
    MeasureJob,
    ScoreJob,
    held_out_loss,
    measure_candidate,
    noised_batches,
    score_units,
)
from tests.small import TINY, group_of, make_run_dir, random_kept, small_config

CPU = torch.device("cpu")
UNITS = units_of(TINY)
CONFIG = small_config()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    return make_run_dir(tmp_path_factory.mktemp("run"))


def ignore(_metrics, _step):
    pass


def drawn(config, index: int, *, purpose: str = "held-out"):
    """Images, noise and timesteps of a group, batches put together."""
    found = list(noised_batches(config, group_of(config, index), CPU, purpose=purpose))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("purpose", ["held-out", "scores"])
def test_all_timesteps_of_the_noise_lie_inside_the_group(index, purpose):
    group = group_of(CONFIG, index)
    x_0, epsilon, timesteps = drawn(CONFIG, index, purpose=purpose)
    assert x_0.shape == epsilon.shape == (CONFIG.prune.num_images, 1, 8, 8)
    assert all(timestep in group.timesteps for timestep in timesteps.tolist())


@pytest.mark.parametrize("index", range(4))
def test_the_timesteps_are_spread_evenly_over_the_group(index):
    group, count = group_of(CONFIG, index), CONFIG.prune.num_images
    found = sorted(drawn(CONFIG, index)[2].tolist())
    size = len(group.timesteps)
    assert found == [group.first + place * size // count for place in range(count)]


def test_more_images_than_timesteps_use_every_timestep():
    config = small_config(
        prune={"num_images": 40, "batch_size": 16}, plan={"num_groups": 10, "min_group_size": 1}
    )
    group = group_of(config, 0)
    assert len(group.timesteps) == 4
    assert set(drawn(config, 0)[2].tolist()) == set(group.timesteps)


def test_noise_is_the_same_at_every_call_and_another_for_every_purpose_group_and_seed():
    first = drawn(CONFIG, 1)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(CONFIG, 1), strict=True))
    others = [
        drawn(CONFIG, 1, purpose="scores"),
        drawn(CONFIG, 2),
        drawn(small_config(seed=1), 1),
    ]
    for part in (0, 1):  # the images, and the noise
        assert not any(torch.equal(first[part], other[part]) for other in others)


def test_the_images_are_different_training_images_in_model_range():
    x_0 = drawn(CONFIG, 0)[0]
    images = to_model_range(load_dataset(CONFIG.data).images)
    places = [(images == image).flatten(1).all(1).nonzero()[0].item() for image in x_0]
    assert len(set(places)) == len(x_0)
    assert x_0.min() == -1
    assert x_0.max() == 1


def test_the_same_candidate_has_the_same_loss_twice(run_dir):
    job = MeasureJob(run_dir, CONFIG, group_of(CONFIG, 0), random_kept(UNITS, seed=0), 1)
    torch.manual_seed(1)
    first = measure_candidate(job, ignore)["loss_cut"]
    torch.manual_seed(2)
    assert measure_candidate(job, ignore)["loss_cut"] == first
    assert math.isfinite(first)
    assert first > 0


def test_another_candidate_and_another_group_have_another_loss(run_dir):
    jobs = [
        MeasureJob(run_dir, CONFIG, group_of(CONFIG, index), random_kept(UNITS, seed), 1)
        for index in (0, 3)
        for seed in (0, 1)
    ]
    assert len({measure_candidate(job, ignore)["loss_cut"] for job in jobs}) == 4


def test_a_candidate_that_keeps_everything_has_the_loss_of_the_base(run_dir):
    group = group_of(CONFIG, 2)
    result = measure_candidate(MeasureJob(run_dir, CONFIG, group, keep_all(UNITS), 0), ignore)
    assert result["loss_cut"] == held_out_loss(load_unet(run_dir.base_unet), CONFIG, group)


def test_the_loss_is_the_mean_over_all_images_however_they_are_batched(run_dir):
    group, unet = group_of(CONFIG, 0), load_unet(run_dir.base_unet)
    whole = held_out_loss(unet, small_config(prune={"num_images": 48, "batch_size": 48}), group)
    parts = held_out_loss(unet, small_config(prune={"num_images": 48, "batch_size": 32}), group)
    assert parts == pytest.approx(whole, rel=1e-5)


def test_the_loss_is_measured_without_dropout():
    group, unet = group_of(CONFIG, 0), build_unet(TINY, dropout=0.5).train()
    assert held_out_loss(unet, CONFIG, group) == held_out_loss(unet, CONFIG, group)


def test_a_measurement_is_reported_at_its_place_in_the_search(run_dir):
    seen = []
    job = MeasureJob(run_dir, CONFIG, group_of(CONFIG, 0), keep_all(UNITS), 5)
    result = measure_candidate(job, lambda metrics, step: seen.append((dict(metrics), step)))
    assert seen == [({"loss_cut": result["loss_cut"]}, 5)]
    assert result["seconds"] > 0


@pytest.mark.parametrize("method", ["random", "magnitude", "taylor"])
def test_units_are_scored_by_the_method_of_the_config(run_dir, method):
    config = small_config(prune={"method": method})
    found = [
        score_units(ScoreJob(run_dir, config, group_of(config, index)), ignore)["scores"]
        for index in (0, 0, 3)
    ]
    assert {name: len(values) for name, values in found[0].items()} == {
        unit.name: unit.width for unit in UNITS
    }
    assert found[0] == found[1]
    if method == "magnitude":  # knows nothing of timesteps
        assert found[0] == found[2] == magnitude_scores(load_unet(run_dir.base_unet), UNITS)
    else:
        assert found[0] != found[2]

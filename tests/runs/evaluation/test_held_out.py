"""Losses in place of scores: of a base with and without experts, on the same noised images."""

import numpy as np
import pytest

from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.runs.evaluation.evaluate import SampleResult
from tdc_ray.runs.evaluation.held_out import (
    held_out_text,
    losses_path,
    mean_losses,
    score_by_loss,
    swapped_losses,
)
from tdc_ray.runs.stages.paired_losses import PairedResult
from tdc_ray.storage.run_dir import RunDir
from tests.small import small_config


def test_one_experts_loss_counts_by_its_share_of_the_timesteps(tmp_path):
    config, run_dir = small_config(compare={"num_images": 200}), RunDir(tmp_path)
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    sizes = np.array([len(group.timesteps) for group in groups])
    losses = np.random.default_rng(0).uniform(0.1, 0.2, (len(groups), 2, 5))
    for group, found in zip(groups, losses, strict=True):
        path = losses_path(run_dir, config, group, "longer-base")
        path.parent.mkdir(exist_ok=True)
        np.save(path, found)
    tdc, base = losses.mean(2).T
    mean = mean_losses(run_dir, config, groups, "longer-base")
    assert mean.loss_base == pytest.approx(np.average(base, weights=sizes))
    assert mean.loss_tdc == pytest.approx(np.average(tdc, weights=sizes))
    for index, found in enumerate(swapped_losses(run_dir, config, groups)):
        mixed = np.where(np.arange(len(groups)) == index, tdc, base)
        assert found == pytest.approx(np.average(mixed, weights=sizes))


def test_its_time_is_that_of_its_samples_and_half_of_the_pairs():
    score = score_by_loss(SampleResult(64, 8.0), 0.1, [PairedResult(9, 18, 3.0)] * 2)
    assert (score.score, score.images_per_second, score.seconds) == (0.1, 8.0, 11.0)
    assert not score.metrics


def test_as_many_noised_images_as_would_be_scored_are_measured():
    config = small_config(evaluate={"num_images": 200}, compare={"num_images": 50})
    assert held_out_text(config).startswith("90 held-out images ")  # half of a tenth of 1,797
    assert "each noised 3 times in every group" in held_out_text(config)

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tdc_ray.config.run import RunConfig
from tdc_ray.models.unet2d.steps import steps
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import load_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.loaded_base import LoadedBase, load_base, prune_and_refit
from tdc_ray.pruning.tasks.candidates import CandidateJob, CandidateResult, measure_candidate
from tdc_ray.storage.run_dir import RunDir
from tests.small import (
    TINY,
    assert_same,
    context_of,
    group_of,
    held_out_loss_of,
    make_run_dir,
    random_kept,
    small_config,
    widths_of,
)

UNITS = units_of(TINY)


def config_of(**prune) -> RunConfig:
    few = {"num_images": 32, "num_refit_images": 16, "num_levels": 2}
    return small_config(prune={**few, **prune})


CONFIG = config_of()
UNFITTED = config_of(refit="none")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    return make_run_dir(tmp_path_factory.mktemp("run"))


def ignore(_metrics, _step):
    pass


def loaded(run_dir: RunDir, config: RunConfig) -> LoadedBase:
    return load_base(context_of(run_dir, config), group_of(config, 0))


def measured(run_dir, config, index, kept, number=1) -> CandidateResult:
    job = CandidateJob(context_of(run_dir, config), group_of(config, index), kept, number)
    return measure_candidate(job, ignore)


def timeless(result: CandidateResult) -> CandidateResult:
    return replace(result, seconds=0.0)


def test_the_same_candidate_has_the_same_losses_twice(run_dir):
    torch.manual_seed(1)
    first = measured(run_dir, CONFIG, 0, random_kept(UNITS, seed=0))
    torch.manual_seed(2)
    assert timeless(measured(run_dir, CONFIG, 0, random_kept(UNITS, seed=0))) == timeless(first)
    for loss in (first.loss_cut, first.loss_refit):
        assert math.isfinite(loss)
        assert loss > 0


def test_another_candidate_and_another_group_have_other_losses(run_dir):
    found = [
        measured(run_dir, CONFIG, index, random_kept(UNITS, seed))
        for index in (0, 3)
        for seed in (0, 1)
    ]
    losses = [loss for result in found for loss in (result.loss_cut, result.loss_refit)]
    assert len(set(losses)) == 8


@pytest.mark.parametrize("config", [CONFIG, UNFITTED], ids=["refit", "no refit"])
def test_a_candidate_that_keeps_everything_has_the_loss_of_the_base(run_dir, config):
    result = measured(run_dir, config, 2, keep_everything(UNITS))
    assert result.loss_cut == held_out_loss_of(
        load_unet(run_dir.base_unet), config, group_of(config, 2)
    )
    assert result.loss_refit == (None if config is UNFITTED else result.loss_cut)


@pytest.mark.parametrize("space", ["inner", "full"])
def test_the_losses_are_those_of_the_cut_and_of_the_refitted_unet(run_dir, space):
    config = config_of(space=space)
    group, base = group_of(config, 0), loaded(run_dir, config)
    kept = random_kept(base.space.units, seed=3)
    result = measured(run_dir, config, 0, kept)
    pruned = cut(base.network, base.space.units, kept)
    assert result.loss_cut == held_out_loss_of(pruned, config, group)
    refitted = prune_and_refit(base, kept).network
    assert result.loss_refit == held_out_loss_of(refitted, config, group)
    assert result.loss_refit != result.loss_cut


def test_without_a_refit_the_pruned_unet_is_the_cut_base(run_dir):
    base, kept = loaded(run_dir, UNFITTED), random_kept(UNITS, seed=0)
    pruned = prune_and_refit(base, kept).network
    assert_same(pruned.state_dict(), cut(base.network, UNITS, kept).state_dict())
    result = measured(run_dir, UNFITTED, 0, kept)
    assert result.loss_refit is None
    assert result.loss_cut == held_out_loss_of(pruned, UNFITTED, group_of(UNFITTED, 0))


@pytest.mark.parametrize("config", [CONFIG, UNFITTED], ids=["refit", "no refit"])
def test_a_measurement_is_reported_at_its_place_in_the_search(run_dir, config):
    seen = []
    kept = random_kept(UNITS, seed=0)
    job = CandidateJob(context_of(run_dir, config), group_of(config, 0), kept, 5)
    result = measure_candidate(job, lambda metrics, step: seen.append((dict(metrics), step)))
    losses = {"loss_cut": result.loss_cut}
    if config is CONFIG:
        losses["loss_refit"] = result.loss_refit
    assert seen == [(losses, 5)]
    assert result.seconds > 0


def test_measuring_costs_a_forward_pass_per_image_and_the_refit_at_least_three(run_dir):
    kept = random_kept(UNITS, seed=0)
    space = loaded(run_dir, CONFIG).space
    macs = space.macs(widths_of(kept))
    assert 32 * macs < measured(run_dir, UNFITTED, 0, kept).macs <= 32 * (space.macs_base + macs)
    passes = 2 * 32 * macs + 16 * (space.macs_base + 2 * macs)
    assert measured(run_dir, CONFIG, 0, kept).macs > passes


def outputs_of(block: str) -> int:
    """Channels of a block's output: 16 where images are 8x8, 32 where they are 4x4."""
    (unit,) = [unit for unit in UNITS if unit.name == block]
    return {64: 16, 16: 32}[unit.pixels]


def test_what_the_base_leaves_spares_the_refits_a_look_back_and_changes_no_loss(tmp_path):
    run_dir, group = make_run_dir(tmp_path), group_of(CONFIG, 0)
    kept, space = random_kept(UNITS, seed=0), loaded(run_dir, CONFIG).space
    alone = measured(run_dir, CONFIG, 0, kept)
    job = CandidateJob(
        context_of(run_dir, CONFIG), group, keep_everything(UNITS), 0, saves_weights=True
    )
    base = measure_candidate(job, ignore)
    products = sum(unit.pixels * outputs_of(unit.name) ** 2 for unit in UNITS)
    weighing = 16 * (2 * space.macs_base + products)
    assert base.macs == 32 * space.macs_base + weighing
    after = measured(run_dir, CONFIG, 0, kept)
    assert after.macs == alone.macs - weighing
    assert (after.loss_cut, after.loss_refit) == (alone.loss_cut, alone.loss_refit)
    names = [step.name for step in steps(load_unet(run_dir.base_unet))]
    names += [f"{unit.name}|channels" for unit in UNITS]
    assert load_file(run_dir.error_weights(0)).keys() == set(names)

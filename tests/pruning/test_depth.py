"""Branches that may go as a whole in what is measured, predicted and chosen."""

import pytest
import torch

from tdc_ray.models.families import family_of
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.knapsack import knapsack, loss_curves
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.second_order import quadratic_model
from tdc_ray.pruning.sensitivity import masked_units, measure_units, solve_units
from tdc_ray.pruning.space import space_of
from tests.pruning.refit.test_refit_dit import SCHEDULE, noised, outputs_of
from tests.small import TINY_DIT, random_dit

SPACE = space_of(TINY_DIT, "depth")
IDLE, OTHER = "transformer_blocks.0.attn1", "transformer_blocks.1.ff"


def test_the_sensitivity_of_a_removed_branch_is_that_of_the_network_without_it():
    base, batches = random_dit(), noised(16)
    scores = {unit.name: [1.0] * unit.width for unit in SPACE.units}
    solutions = masked_units(base, SPACE.units, scores, 1)
    measured = measure_units(base, solutions, batches, SCHEDULE)
    before = outputs_of(base, batches)
    target = torch.cat([batch.epsilon for batch in batches])
    for unit in SPACE.units:
        kept = {**keep_everything(SPACE.units), unit.name: ()}
        after = outputs_of(family_of(base).cut(base, SPACE.units, kept), batches)
        increase = (after - target).square().mean() - (before - target).square().mean()
        assert measured[unit.name] == {0: pytest.approx(float(increase), rel=1e-3)}


def test_a_branch_that_does_nothing_is_removed_first():
    base, batches = random_dit(), noised(32)
    layer = base.get_submodule(IDLE).to_out[0]
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    weights = error_weights(base, batches, SCHEDULE, [*SPACE.full])
    _, solutions, _ = solve_units(base, SPACE.units, {}, batches, SCHEDULE, weights, 2)
    model = quadratic_model(base, solutions, batches, SCHEDULE, num_probes=2)
    increase = JointIncrease(SPACE, model)
    measured = measure_units(base, solutions, batches, SCHEDULE)
    limit = SPACE.macs({**SPACE.full, IDLE: 0})
    for sensitivities in (increase.sensitivities(), measured):
        assert sensitivities[IDLE][0] == pytest.approx(0, abs=1e-7)
        assert sensitivities[OTHER][0] > 1e-3
        scheme = knapsack(SPACE, loss_curves(SPACE, sensitivities), limit)
        assert scheme == {**SPACE.full, IDLE: 0}
    assert increase.best_scheme(limit) == {**SPACE.full, IDLE: 0}

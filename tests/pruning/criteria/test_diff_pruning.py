import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.diff_pruning import diff_pruning_scores
from tests.pruning.criteria.inputs import SCHEDULE, UNITS, noised, unit_named
from tests.small import TINY, random_unet


def summed_by_hand(unit: Unit, values: Mapping[str, Tensor]) -> list[float]:
    """Values of all weights of each group or head of a unit of TINY, added up."""
    total = unit.width * unit.channels
    sums = []
    for step in range(unit.width):
        rows = slice(step * unit.channels, (step + 1) * unit.channels)
        shift = slice(total + rows.start, total + rows.stop)
        if unit.kind == "residual":
            places = [("conv1", rows), ("norm2", rows)]
            places += [("time_emb_proj", rows), ("time_emb_proj", shift)]
            behind = "conv2.weight"
        else:
            places = [(f"to_{name}", rows) for name in "qkv"]
            behind = "to_out.0.weight"
        parts = [values[f"{unit.name}.{behind}"][:, rows]]
        for layer, place in places:
            parts += [values[f"{unit.name}.{layer}.{name}"][place] for name in ("weight", "bias")]
        sums.append(sum(float(part.double().sum()) for part in parts))
    return sums


@pytest.mark.parametrize(
    "name", ["down_blocks.1.resnets.0", "mid_block.attentions.0", "up_blocks.1.resnets.1"]
)
def test_diff_pruning_adds_up_weight_times_gradient_over_the_timesteps_by_hand(name):
    unet, unit, (batch,), timesteps = random_unet(), unit_named(name), noised(4), range(200, 205)
    scores, seen = diff_pruning_scores(unet, UNITS, batch, timesteps, SCHEDULE)

    gradients = {key: torch.zeros_like(value) for key, value in unet.named_parameters()}
    for timestep in timesteps:
        x_t = SCHEDULE.signal[timestep] * batch.x_0 + SCHEDULE.noise[timestep] * batch.epsilon
        loss = nn.functional.mse_loss(unet(x_t, timestep).sample, batch.epsilon)
        found = torch.autograd.grad(loss, list(unet.parameters()))
        for gradient, change in zip(gradients.values(), found, strict=True):
            gradient += change
    products = {
        key: (value.detach() * gradients[key]).abs() for key, value in unet.named_parameters()
    }
    assert seen == 5
    assert scores[name] == pytest.approx(summed_by_hand(unit, products), rel=1e-4)


def without_noise(schedule: NoiseSchedule) -> NoiseSchedule:
    """All timesteps see the image itself, and differ only in the time embedding."""
    return replace(
        schedule, signal=torch.ones_like(schedule.signal), noise=torch.zeros_like(schedule.noise)
    )


def test_diff_pruning_stops_where_the_loss_is_far_below_the_largest_and_leaves_it_out():
    unet, (batch,), schedule = random_unet(), noised(4), without_noise(SCHEDULE)
    at_103 = replace(batch, timesteps=torch.full((4,), 103))
    solved = replace(batch, epsilon=at_103.predict(unet, schedule).detach())  # no loss at 103
    scores, seen = diff_pruning_scores(unet, UNITS, solved, range(100, 110), schedule)
    assert seen == 4
    assert (scores, 3) == diff_pruning_scores(unet, UNITS, solved, range(100, 103), schedule)


def test_diff_pruning_compares_with_the_largest_loss_so_far_and_not_with_the_last():
    unet, (batch,) = random_unet(), noised(4)
    with torch.no_grad():
        unet.time_embedding.linear_2.weight.zero_()  # it sees the fading image alone
    schedule = without_noise(SCHEDULE)
    schedule.signal[:7] = torch.tensor([1, 0.05, 0.02, 0.014, 0.008, 0.004, 0])

    def loss_at(timestep: int, batch: NoisedBatch) -> float:
        at = replace(batch, timesteps=torch.full((4,), timestep))
        return float((at.predict(unet, schedule).detach() - batch.epsilon).square().mean())

    last = replace(batch, timesteps=torch.full((4,), 6))
    solved = replace(batch, epsilon=last.predict(unet, schedule).detach())
    losses = [loss_at(timestep, solved) for timestep in range(6)]
    assert all(0.05 < b / a < 1 for a, b in itertools.pairwise(losses))
    first = next(place for place, loss in enumerate(losses) if loss < 0.05 * losses[0])
    _, seen = diff_pruning_scores(unet, UNITS, solved, range(7), schedule)
    assert seen == first + 1 == 5


def test_diff_pruning_looks_at_all_timesteps_where_the_loss_never_falls_that_far():
    (batch,) = noised(4)
    _, seen = diff_pruning_scores(random_unet(), UNITS, batch, range(990, 1000), SCHEDULE)
    assert seen == 10


def test_diff_pruning_heeds_neither_the_batchs_timesteps_nor_a_learnt_variance():
    unet, (batch,) = random_unet({**TINY, "out_channels": 2}), noised(4)
    first, _ = diff_pruning_scores(unet, UNITS, batch, range(5, 8), SCHEDULE)
    with torch.no_grad():
        unet.conv_out.weight[1] += 1.0  # the variance's
    other = replace(batch, timesteps=batch.timesteps.flip(0))
    again, _ = diff_pruning_scores(unet, UNITS, other, range(5, 8), SCHEDULE)
    assert all(again[name] == pytest.approx(first[name], rel=1e-5) for name in first)


def test_diff_pruning_leaves_no_gradient_behind():
    unet, (batch,) = random_unet(), noised(4)
    unet.conv_in.weight.grad = torch.ones_like(unet.conv_in.weight)
    diff_pruning_scores(unet, UNITS, batch, range(2), SCHEDULE)
    assert all(parameter.grad is None for parameter in unet.parameters())

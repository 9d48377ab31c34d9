import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from tdc_ray.diffusion.loss import denoising_loss
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule, noise_schedule
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.scores import (
    Scores,
    diff_pruning_scores,
    magnitude_scores,
    random_scores,
    reconstruction_scores,
    select_top,
    taylor_scores,
)
from tdc_ray.pruning.refit.least_squares import LeastSquares
from tests.small import TINY, random_unet, small_config

UNITS = units_of(TINY)
SCHEDULE = noise_schedule(small_config().diffusion)
TIME_ADDED = {**TINY, "resnet_time_scale_shift": "default"}


def noised(*sizes: int) -> list[NoisedBatch]:
    generator = torch.Generator().manual_seed(1)
    return [
        NoisedBatch(
            torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1,
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(0, 1000, (size,), generator=generator),
        )
        for size in sizes
    ]


def scores_by(method: str) -> Scores:
    if method == "random":
        return random_scores(UNITS, seed=0)
    if method == "magnitude":
        return magnitude_scores(random_unet(), UNITS)
    if method == "taylor":
        return taylor_scores(random_unet(), UNITS, noised(4), SCHEDULE)
    (batch,) = noised(4)
    return diff_pruning_scores(random_unet(), UNITS, batch, range(500, 503), SCHEDULE)[0]


def unit_named(name: str) -> Unit:
    return next(unit for unit in UNITS if unit.name == name)


@pytest.mark.parametrize("method", ["random", "magnitude", "taylor", "diff-pruning"])
def test_every_group_and_head_of_every_unit_has_a_score(method):
    scores = scores_by(method)
    assert list(scores) == [unit.name for unit in UNITS]
    for unit in UNITS:
        values = scores[unit.name]
        assert len(values) == unit.width
        assert all(isinstance(value, float) and value >= 0 for value in values)
        assert len(set(values)) == unit.width


def test_random_scores_follow_from_the_seed_alone():
    torch.manual_seed(5)
    one = random_scores(UNITS, seed=3)
    torch.manual_seed(6)
    assert random_scores(UNITS, seed=3) == one
    assert random_scores(UNITS, seed=4) != one


@torch.no_grad()
def test_magnitude_of_a_residual_block_by_hand():
    unet, unit = random_unet(), unit_named("down_blocks.1.resnets.0")
    assert (unit.width, unit.channels) == (8, 4)
    block = unet.get_submodule(unit.name)
    for group in range(8):
        rows = slice(4 * group, 4 * group + 4)
        shift = slice(32 + 4 * group, 32 + 4 * group + 4)
        weights = (
            block.conv1.weight[rows],
            block.conv1.bias[rows],
            block.time_emb_proj.weight[rows],
            block.time_emb_proj.weight[shift],
            block.time_emb_proj.bias[rows],
            block.time_emb_proj.bias[shift],
            block.norm2.weight[rows],
            block.norm2.bias[rows],
            block.conv2.weight[:, rows],
        )
        expected = sum(float(weight.square().sum()) for weight in weights)
        score = magnitude_scores(unet, UNITS)[unit.name][group]
        assert score == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_magnitude_of_an_attention_by_hand():
    unet, unit = random_unet(), unit_named("mid_block.attentions.0")
    assert (unit.width, unit.channels) == (2, 16)
    block = unet.get_submodule(unit.name)
    for head in range(2):
        rows = slice(16 * head, 16 * head + 16)
        weights = [block.to_out[0].weight[:, rows]]
        for layer in (block.to_q, block.to_k, block.to_v):
            weights += [layer.weight[rows], layer.bias[rows]]
        expected = sum(float(weight.square().sum()) for weight in weights)
        score = magnitude_scores(unet, UNITS)[unit.name][head]
        assert score == pytest.approx(expected, rel=1e-5)


def gates_of(unet: UNet2DModel, unit: Unit) -> tuple[Tensor, dict[str, Tensor]]:
    """A factor per channel, and the weights that go with the channels, multiplied by it."""
    gate = torch.ones(unit.width * unit.channels, requires_grad=True)
    weights = dict(unet.named_parameters())

    def scaled(name: str, *, columns: bool = False) -> dict[str, Tensor]:
        full = f"{unit.name}.{name}"
        weight = weights[full]
        front = weight.movedim(1, 0) if columns else weight
        factor = gate.repeat(len(front) // len(gate)).reshape(-1, *[1] * (front.ndim - 1))
        product = front * factor
        return {full: product.movedim(0, 1) if columns else product}

    changed: dict[str, Tensor] = {}
    if unit.kind == "residual":
        for layer in ("conv1", "time_emb_proj", "norm2"):
            changed |= scaled(f"{layer}.weight") | scaled(f"{layer}.bias")
        changed |= scaled("conv2.weight", columns=True)
    else:
        for layer in ("to_q", "to_k", "to_v"):
            changed |= scaled(f"{layer}.weight") | scaled(f"{layer}.bias")
        changed |= scaled("to_out.0.weight", columns=True)
    return gate, changed


@pytest.mark.parametrize("config", [TINY, TIME_ADDED], ids=["scale-shift", "time-added"])
@pytest.mark.parametrize(
    "name", ["down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.1.resnets.1"]
)
def test_taylor_is_the_first_order_change_of_the_mean_loss(config, name):
    unet = random_unet(config)
    (unit,) = (unit for unit in units_of(config) if unit.name == name)
    batches = noised(3, 5)  # of different sizes: every image counts the same
    scores = taylor_scores(unet, (unit,), batches, SCHEDULE)

    gate, changed = gates_of(unet, unit)

    def model(sample: Tensor, timestep: Tensor) -> object:
        return functional_call(unet, changed, (sample, timestep))

    losses = torch.cat([denoising_loss(model, SCHEDULE, batch) for batch in batches])
    (slope,) = torch.autograd.grad(losses.mean(), gate)
    expected = slope.abs().view(unit.width, unit.channels).sum(1)
    assert len(losses) == 8
    assert scores[name] == pytest.approx(expected.tolist(), rel=1e-3)


def test_taylor_leaves_no_gradient_and_no_change_behind():
    unet = random_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.conv_in.weight.grad = torch.ones_like(unet.conv_in.weight)
    taylor_scores(unet, UNITS, noised(4), SCHEDULE)
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_taylor_does_not_depend_on_gradients_of_earlier_work():
    unet = random_unet()
    first = taylor_scores(unet, UNITS, noised(4), SCHEDULE)
    for parameter in unet.parameters():
        parameter.grad = torch.full_like(parameter, 9.0)
    assert taylor_scores(unet, UNITS, noised(4), SCHEDULE) == first


@pytest.mark.parametrize("method", ["taylor", "diff-pruning"])
def test_images_whose_gradients_do_not_fit_at_once_are_taken_in_parts(monkeypatch, method):
    whole = scores_by(method)
    monkeypatch.setattr(
        "tdc_ray.pruning.criteria.scores.max_batch_size", lambda *_, **__: 3
    )  # of 4
    for name, scores in scores_by(method).items():
        assert scores == pytest.approx(whole[name], rel=1e-3)


# --- Diff-Pruning ----------------------------------------------------------------------------


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


# --- reconstruction --------------------------------------------------------------------------


def unit_and_squares(seed: int, *, linear: bool, width: int = 4) -> tuple[Unit, LeastSquares]:
    """A unit of four steps of two channels whose channels can make up for each other."""
    torch.manual_seed(seed)
    unit = Unit("block", "attention" if linear else "residual", width, 2, pixels=36)
    layer = nn.Linear(2 * width, 5) if linear else nn.Conv2d(2 * width, 5, 3, padding=1)
    mixed = torch.randn(20, 36, 2 * width) @ torch.randn(2 * width, 2 * width)
    inputs = mixed if linear else mixed.transpose(1, 2).reshape(20, 2 * width, 6, 6)
    squares = LeastSquares(layer, num_rows=1, seed=0)
    squares.add(inputs, layer(inputs).detach() + 0.1)
    return unit, squares


def least_error(squares: LeastSquares, columns: list[int]) -> float:
    """What is left of the error with some columns alone, but for a constant."""
    gram, cross = squares.normal()
    solved = torch.linalg.lstsq(gram[columns][:, columns], cross[columns]).solution
    return -float((cross[columns] * solved).sum())


@pytest.mark.parametrize("linear", [True, False], ids=["attention", "residual"])
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_reconstruction_eliminates_as_brute_force_does(linear, seed):
    unit, squares = unit_and_squares(seed, linear=linear)
    taps = 1 if linear else 9

    def columns(steps: set[int]) -> list[int]:
        size = unit.channels * taps
        return [step * size + place for step in sorted(steps) for place in range(size)]

    left, expected = set(range(unit.width)), [0.0] * unit.width
    start = least_error(squares, columns(left))
    while left:
        errors = {
            step: (least_error(squares, columns(left - {step})) if len(left) > 1 else 0.0) - start
            for step in left
        }
        gone = min(errors, key=errors.__getitem__)
        expected[gone] = errors[gone]
        left.remove(gone)
    assert reconstruction_scores(unit, squares) == pytest.approx(expected, rel=1e-6)


def test_a_step_that_is_a_copy_of_another_goes_first_and_costs_nothing():
    torch.manual_seed(0)
    unit, layer = Unit("block", "attention", 3, 2, pixels=36), nn.Linear(6, 5)
    inputs = torch.randn(20, 36, 6)
    inputs[..., 4:] = inputs[..., :2]
    squares = LeastSquares(layer, num_rows=1, seed=0)
    squares.add(inputs, layer(inputs).detach())
    scores = reconstruction_scores(unit, squares)
    assert min(scores[0], scores[2]) < 1e-3 * min(scores[1], max(scores[0], scores[2]))


def test_a_step_that_nothing_reads_costs_nothing():
    unit, squares = unit_and_squares(0, linear=True)
    with torch.no_grad():
        squares.layer.weight[:, 2:4] = 0.0
    inputs = torch.randn(20, 36, 8)
    silent = LeastSquares(squares.layer, num_rows=1, seed=0)
    silent.add(inputs, squares.layer(inputs).detach())
    scores = reconstruction_scores(unit, silent)
    assert scores[1] < 1e-6 * min(scores[:1] + scores[2:])


# --- choosing --------------------------------------------------------------------------------


def test_the_highest_scores_are_kept_in_rising_order_and_the_first_of_equals():
    unit = Unit("block", "residual", width=4, channels=1, pixels=1)
    scores = {"block": [1.0, 3.0, 2.0, 3.0]}
    chosen = [select_top((unit,), scores, {"block": width})["block"] for width in (1, 2, 3, 4)]
    assert chosen == [(1,), (1, 3), (1, 2, 3), (0, 1, 2, 3)]

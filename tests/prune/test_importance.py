import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.func import functional_call

from tdc_ray.diffusion import denoising_loss, noise_schedule
from tdc_ray.models.units import Unit, units_of
from tdc_ray.prune.importance import (
    NoisedBatch,
    Scores,
    keep_best,
    magnitude_scores,
    random_scores,
    taylor_scores,
)
from tests.small import TINY, random_unet, small_config

UNITS = units_of(TINY)
SCHEDULE = noise_schedule(small_config().diffusion)
TIME_ADDED = {**TINY, "resnet_time_scale_shift": "default"}


def noised(*sizes: int) -> list[NoisedBatch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
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
    return taylor_scores(random_unet(), UNITS, noised(4), SCHEDULE)


def unit_named(name: str) -> Unit:
    return next(unit for unit in UNITS if unit.name == name)


@pytest.mark.parametrize("method", ["random", "magnitude", "taylor"])
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

    losses = torch.cat([denoising_loss(model, SCHEDULE, *batch) for batch in batches])
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


def test_the_highest_scores_are_kept_in_rising_order_and_the_first_of_equals():
    unit = Unit("block", "residual", width=4, channels=1, pixels=1)
    scores = {"block": [1.0, 3.0, 2.0, 3.0]}
    chosen = [keep_best((unit,), scores, {"block": width})["block"] for width in (1, 2, 3, 4)]
    assert chosen == [(1,), (1, 3), (1, 2, 3), (0, 1, 2, 3)]

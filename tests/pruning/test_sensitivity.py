import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.models.unet2d.blocks import output_layer
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import Unit, keep_everything
from tdc_ray.pruning.criteria.magnitude import magnitude_scores
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.refit.error_weights import ErrorWeights, error_weights
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.sensitivity import (
    Solutions,
    Weights,
    levels,
    masked_units,
    measure_units,
    solve_units,
)
from tests.models.configs import CONFIGS
from tests.small import TINY, assert_same, random_unet, small_config

SCHEDULE = noise_schedule(small_config().diffusion)
UNITS = units_of(TINY)
KINDS = ["attention-everywhere", "resampled-by-residual-blocks"]


def noised(*sizes: int, seed: int = 0) -> list[NoisedBatch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        NoisedBatch(
            torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1,
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(0, 1000, (size,), generator=generator),
        )
        for size in sizes
    ]


SEEN, HELD_OUT = noised(14, 10), noised(4, 3, seed=1)


def weights_of(base: UNet2DModel) -> ErrorWeights:
    names = [unit.name for unit in units_of(base.config)]
    return error_weights(base, SEEN, SCHEDULE, names)


@torch.no_grad()
def loss_of(unet: UNet2DModel) -> float:
    """Mean over all held-out images, by whole forward passes."""
    losses = [loss_per_image(SCHEDULE, b.predict(unet, SCHEDULE), b) for b in HELD_OUT]
    return float(torch.cat(losses).double().mean())


def columns_of(unit: Unit, kept: tuple[int, ...], weights: Weights) -> Tensor:
    """What is left of the weights behind a unit: ``(outputs, kept channels, ...)``."""
    return weights[0][:, unit.channel_indices(kept)]


def cut_alone(base: UNet2DModel, unit: Unit, kept: tuple[int, ...]) -> UNet2DModel:
    units = units_of(base.config)
    return cut(base, units, keep_everything(units) | {unit.name: kept})


@torch.no_grad()
def cut_with(
    base: UNet2DModel, unit: Unit, kept: tuple[int, ...], weights: Weights
) -> UNet2DModel:
    """The slow way: cut the unit, and put the weights into what is left."""
    pruned = cut_alone(base, unit, kept)
    layer = reader_of(pruned, unit)
    layer.weight.copy_(columns_of(unit, kept, weights))
    layer.bias.copy_(weights[1])
    return pruned


def reader_of(unet: UNet2DModel, unit: Unit) -> nn.Conv2d | nn.Linear:
    block = unet.get_submodule(unit.name)
    return block.get_submodule(output_layer(block))


@torch.no_grad()
def distance(one: UNet2DModel, other: UNet2DModel) -> float:
    """Squared difference of their outputs."""
    pairs = [(b.predict(one, SCHEDULE), b.predict(other, SCHEDULE)) for b in SEEN]
    return sum(float((left - right).square().sum()) for left, right in pairs)


def kept_at(unit: Unit, width: int, scores: dict[str, list[float]]) -> tuple[int, ...]:
    return select_top((unit,), scores, {unit.name: width})[unit.name]


@pytest.mark.parametrize("name", KINDS)
def test_the_growth_is_that_of_cutting_a_unit_alone_and_solving_behind_it(name):
    config = CONFIGS[name]
    base, units = random_unet(config), units_of(config)
    scores, solutions, _ = solve_units(
        base, units, {}, SEEN, SCHEDULE, weights_of(base), num_levels=2
    )
    grown = measure_units(base, solutions, HELD_OUT, SCHEDULE)
    before = loss_of(base)
    assert list(grown) == [unit.name for unit in units]
    for unit in units:
        assert sorted(grown[unit.name]) == levels(unit, 2)
        for width, growth in grown[unit.name].items():
            kept = kept_at(unit, width, scores)
            pruned = cut_with(base, unit, kept, *solutions[unit.name][width])
            assert growth == pytest.approx(loss_of(pruned) - before, abs=2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_behind_a_unit_are_those_of_the_refit(name):
    config = CONFIGS[name]
    base, units = random_unet(config), units_of(config)
    scores, solutions, _ = solve_units(
        base, units, {}, SEEN, SCHEDULE, weights_of(base), num_levels=2
    )
    for unit in [unit for unit in units if unit.width > 1][::3]:
        width = levels(unit, 2)[-1]
        kept = kept_at(unit, width, scores)
        refitted = cut_alone(base, unit, kept)
        choice = keep_everything(units) | {unit.name: kept}
        refit(base, refitted, kept_outputs(base, units, choice), SEEN, SCHEDULE, weights_of(base))
        layer, (found,) = reader_of(refitted, unit), solutions[unit.name][width]
        whole = torch.zeros_like(found[0])
        whole[:, unit.channel_indices(kept)] = layer.weight.detach()
        ours = cut_with(base, unit, kept, found)
        theirs = cut_with(base, unit, kept, (whole, layer.bias.detach()))
        # Their ridges are not quite the same, and weights alone may be anything.
        assert distance(ours, theirs) < 0.1 * distance(ours, base)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_without_a_refit_the_growth_is_that_of_the_plain_cut(name):
    config = CONFIGS[name]
    base, units = random_unet(config), units_of(config)
    scores = magnitude_scores(base, units)
    solutions = masked_units(base, units, scores, num_levels=2)
    grown = measure_units(base, solutions, HELD_OUT, SCHEDULE)
    before = loss_of(base)
    for unit in units:
        assert sorted(grown[unit.name]) == levels(unit, 2)
        for width, growth in grown[unit.name].items():
            pruned = cut_alone(base, unit, kept_at(unit, width, scores))
            assert growth == pytest.approx(loss_of(pruned) - before, abs=2e-6)


def test_weights_of_what_is_cut_are_zero():
    base = random_unet()
    scores = magnitude_scores(base, UNITS)
    solved_scores, solved, _ = solve_units(
        base, UNITS, {}, SEEN, SCHEDULE, weights_of(base), num_levels=2
    )
    masked = masked_units(base, UNITS, scores, num_levels=2)
    for unit in UNITS:
        for found, ranked in ((solved, solved_scores), (masked, scores)):
            for width, (weights,) in found[unit.name].items():
                kept = kept_at(unit, width, ranked)
                gone = tuple(step for step in range(unit.width) if step not in kept)
                assert not columns_of(unit, gone, weights).any()
                assert columns_of(unit, kept, weights).any()


def test_solving_behind_a_unit_costs_less_than_just_cutting_it():
    base = random_unet()
    scores, solved, _ = solve_units(
        base, UNITS, {}, SEEN, SCHEDULE, weights_of(base), num_levels=2
    )
    masked = masked_units(base, UNITS, scores, num_levels=2)

    def off_by(unit: Unit, weights: Weights) -> float:
        return distance(base, cut_with(base, unit, tuple(range(unit.width)), weights))

    for unit in UNITS:
        width = levels(unit, 2)[0]
        assert off_by(unit, *solved[unit.name][width]) < off_by(unit, *masked[unit.name][width])


def test_the_statistics_macs_are_counted_for_every_unit():
    base, total = random_unet(), 0
    weights, num_images = weights_of(base), sum(len(batch.x_0) for batch in SEEN)
    for unit in UNITS[::3]:
        *_, macs = solve_units(base, [unit], {}, SEEN, SCHEDULE, weights, num_levels=1)
        name = "conv2" if unit.kind == "residual" else "to_out.0"
        layer = base.get_submodule(f"{unit.name}.{name}")
        outputs, inputs = len(layer.weight), layer.weight[0].numel()
        rows, triangle = num_images * unit.pixels, inputs * (inputs + 1) // 2
        least = rows * (triangle + inputs * outputs)  # the triangle is taken in blocks
        assert least <= macs <= rows * (inputs * inputs + inputs * outputs)
        total += macs
    *_, together = solve_units(base, UNITS[::3], {}, SEEN, SCHEDULE, weights, num_levels=1)
    assert together == total


def test_the_bases_weights_are_put_back():
    base = random_unet()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    places = {name: value.data_ptr() for name, value in base.named_parameters()}
    _, solutions, _ = solve_units(base, UNITS, {}, SEEN, SCHEDULE, weights_of(base), num_levels=2)
    measure_units(base, solutions, HELD_OUT, SCHEDULE)
    assert_same(base.state_dict(), before)
    assert {name: value.data_ptr() for name, value in base.named_parameters()} == places
    assert not any(module._forward_hooks for module in base.modules())


def test_weights_that_do_not_fit_leave_the_base_as_it_was():
    base = random_unet()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    wrong: Solutions = {UNITS[0].name: {1: [(torch.zeros(1, 1, 1, 1), torch.zeros(1))]}}
    with pytest.raises(RuntimeError):
        measure_units(base, wrong, HELD_OUT, SCHEDULE)
    assert_same(base.state_dict(), before)


def test_the_bases_own_weights_make_the_loss_grow_by_nothing():
    base = random_unet()
    own: Solutions = {}
    for unit in UNITS:
        layer = reader_of(base, unit)
        own[unit.name] = {1: [(layer.weight.detach().clone(), layer.bias.detach().clone())]}
    grown = measure_units(base, own, HELD_OUT, SCHEDULE)
    assert grown == {unit.name: {1: 0.0} for unit in UNITS}


@given(st.integers(1, 200), st.integers(1, 12))
def test_levels_are_spread_evenly_below_a_units_width_down_to_one(width, num_levels):
    found = levels(Unit("block", "residual", width, 1, 1), num_levels)
    assert found == sorted(set(found))
    assert all(1 <= level < width for level in found)
    assert len(found) == min(num_levels, width - 1)
    if found:
        assert found[0] == 1
        steps = [b - a for a, b in zip(found, [*found[1:], width], strict=True)]
        assert max(steps) - min(steps) <= 1

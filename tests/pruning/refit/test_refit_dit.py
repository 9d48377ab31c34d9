"""The refit, and what is solved before it, for a transformer: heads and feed-forward widths."""

import pytest
import torch
from torch import Tensor

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.models.families import family_of, steps_of
from tdc_ray.models.step import run
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.refit.refit import _ungated, refit
from tdc_ray.pruning.second_order import quadratic_model
from tdc_ray.pruning.sensitivity import (
    measure_units,
    reader_layers,
    solve_units,
    swapped_readers,
)
from tdc_ray.pruning.space import space_of
from tests.small import TINY_DIT, assert_same, random_dit

SCHEDULE, UNITS = noise_schedule(DiffusionConfig()), space_of(TINY_DIT).units


def noised(*sizes: int, seed: int = 0) -> list[NoisedBatch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        NoisedBatch(
            torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1,
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(200, 600, (size,), generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for size in sizes
    ]


@torch.no_grad()
def outputs_of(network, batches: list[NoisedBatch]) -> Tensor:
    return torch.cat([batch.predict(network, SCHEDULE) for batch in batches])


def cut_to(share: float, kind: str) -> dict[str, tuple[int, ...]]:
    chosen = [unit for unit in UNITS if kind in ("both", unit.kind)]
    return keep_everything(UNITS) | {
        unit.name: tuple(range(round(share * unit.width))) for unit in chosen
    }


def refitted(base, kept, batches):
    pruned = family_of(base).cut(base, UNITS, kept)
    weights = error_weights(base, batches, SCHEDULE)
    refit(base, pruned, kept_outputs(base, UNITS, kept), batches, SCHEDULE, weights)
    return pruned


@pytest.mark.parametrize("kind", ["attention", "feed-forward", "both"])
def test_the_refit_brings_the_prediction_nearer_to_the_bases(kind):
    base, kept, unseen = random_dit(), cut_to(0.5, kind), noised(64, seed=1)
    cut = family_of(base).cut(base, UNITS, kept)
    wanted = outputs_of(base, unseen)
    off = [
        float((outputs_of(network, unseen) - wanted).square().mean())
        for network in (cut, refitted(base, kept, noised(96, 96)))
    ]
    assert off[1] < 0.7 * off[0]


def test_where_nothing_is_cut_nothing_changes():
    base = random_dit()
    same = refitted(base, keep_everything(UNITS), noised(8))
    assert_same(same.state_dict(), base.state_dict())


def test_what_is_added_behind_an_open_gate_is_the_error_divided_by_it():
    missing, gate = torch.randn(4, 3, 2), torch.tensor([[1.0, 2.0]] * 4)
    gate[0, 0] = 0
    added = _ungated(missing, gate)
    assert not added[0, :, 0].any()  # nothing comes through
    torch.testing.assert_close(added[1:, :, 1], missing[1:, :, 1] / 2 / 1.1)


@torch.no_grad()
def test_gradients_behind_gates_are_those_of_the_layers_outputs():
    base, batch = random_dit(), noised(4)[0]
    state = first_state(base, batch, SCHEDULE)
    *before, step, end = steps_of(base)
    state = run(before, state)
    error = torch.randn(4, 32, 16) * 1e-2
    gate = step.gate(state, "hidden")
    handle = step.module.get_submodule(step.output_layers["hidden"]).register_forward_hook(
        lambda _, __, output: output + error.transpose(1, 2)
    )
    moved = step(state).hidden
    handle.remove()
    expected = gate[:, :, None, None] * error.unflatten(2, (4, 4))
    torch.testing.assert_close(moved - step(state).hidden, expected, rtol=1e-3, atol=1e-5)
    images = end(step(state)).hidden
    layer = end.module(end.norm(torch.zeros(4, 16, 32)))
    assert end.in_layer(images, "hidden").shape == layer.shape


def test_sensitivities_of_heads_and_widths_are_measured_and_predicted():
    base, batches = random_dit(), noised(64)
    weights = error_weights(base, batches, SCHEDULE, [unit.name for unit in UNITS])
    scores, solutions, macs = solve_units(base, UNITS, {}, batches, SCHEDULE, weights, 2)
    assert macs > 0
    assert {unit.name: unit.width for unit in UNITS} == {
        name: len(values) for name, values in scores.items()
    }
    for unit in UNITS:  # the best ones are kept, whatever the number
        few, more = (select_top((unit,), scores, {unit.name: w})[unit.name] for w in (1, 3))
        assert set(few) < set(more)
    measured = measure_units(base, solutions, batches, SCHEDULE)
    model = quadratic_model(base, solutions, batches, SCHEDULE, num_probes=8)
    cuts = [(name, width) for name, widths in model.levels.items() for width in widths]
    wanted, layers = outputs_of(base, batches), reader_layers(steps_of(base))
    for place, (name, width) in enumerate(cuts):
        assert measured[name][width] != 0
        with swapped_readers(layers[name].values(), solutions[name][width]):
            moved = float((outputs_of(base, batches) - wanted).square().mean())
        assert model.products[place][place] == pytest.approx(moved, rel=0.3)

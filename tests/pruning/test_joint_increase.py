import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.errors import LimitError
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.knapsack import knapsack, loss_curves
from tdc_ray.pruning.quadratic_model import QuadraticModel
from tdc_ray.pruning.space import Scheme, Space, space_of
from tests.pruning.proxies.test_offline import SMALL, limit_at
from tests.small import TINY_DIT

DIGITS = space_of(architecture("digits"))
DEPTH = space_of(TINY_DIT, "depth")
either = st.sampled_from([DIGITS, DEPTH])
seeds, shares = st.integers(0, 10**6), st.floats(0.05, 0.95)


def model_of(space: Space, seed: int, num_levels: int = 3) -> QuadraticModel:
    """What random cuts do, the more the narrower, to a prediction of few values."""
    draw, levels, moves = np.random.default_rng(seed), {}, []
    for unit in space.units:
        levels[unit.name] = unit.legal_widths[:-1][:: max(1, (unit.width - 1) // num_levels)]
        direction = draw.standard_normal(6) * 10 ** draw.uniform(-2, 0)
        for width in levels[unit.name]:
            moves.append((unit.width - width) * (direction + 0.2 * draw.standard_normal(6)))
    products = np.array(moves) @ np.array(moves).T
    return QuadraticModel(levels, tuple(map(tuple, products.tolist())))


def random_scheme(space: Space, seed: int) -> Scheme:
    draw = np.random.default_rng(seed)
    return {name: int(draw.choice(widths)) for name, widths in space.legal.items()}


@given(either, seeds)
def test_the_increase_is_the_sum_of_its_cuts_and_half_of_what_they_do_to_each_other(space, seed):
    model = model_of(space, seed)
    scheme = {
        name: int(np.random.default_rng(seed + i).choice([*levels, space.full[name]]))
        for i, (name, levels) in enumerate(model.levels.items())
    }
    rows = [(name, width) for name, levels in model.levels.items() for width in levels]
    chosen = [index for index, (name, width) in enumerate(rows) if scheme[name] == width]
    products = np.array(model.products)[np.ix_(chosen, chosen)]
    expected = (products.sum() + products.trace()) / 2
    assert JointIncrease(space, model).of(scheme) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_between_levels_the_move_and_not_the_increase_is_linear():
    unit = DIGITS.units[0]
    model = QuadraticModel({unit.name: (2, 4)}, ((9.0, 6.0), (6.0, 4.0)))  # moves of 3 and 2
    increase = JointIncrease(DIGITS, model)
    moves = [np.sqrt(increase.of({**DIGITS.full, unit.name: width})) for width in range(1, 9)]
    assert moves == pytest.approx([3, 3, 2.5, 2, 1.5, 1, 0.5, 0])
    assert increase.sensitivities()[unit.name] == pytest.approx(
        {width: moves[width - 1] ** 2 for width in range(1, 8)}
    )
    assert set(increase.sensitivities()[DIGITS.units[1].name].values()) == {0.0}


@given(either, seeds, seeds)
def test_a_fall_is_the_difference_of_two_schemes(space, seed, other):
    increase, scheme = JointIncrease(space, model_of(space, seed)), random_scheme(space, seed)
    (name, width), *_ = sorted(random_scheme(space, other).items())
    expected = increase.of(scheme) - increase.of({**scheme, name: width})
    assert increase.falls(scheme)(name, width) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@settings(max_examples=10)
@given(seeds, shares)
def test_exchanges_keep_the_limit_and_are_no_worse_than_the_knapsack(seed, share):
    increase, limit = JointIncrease(DIGITS, model_of(DIGITS, seed)), limit_at(DIGITS, share)
    found = increase.best_scheme(limit)
    start = knapsack(DIGITS, loss_curves(DIGITS, increase.sensitivities()), limit)
    assert DIGITS.cost(found) <= limit
    assert all(found[name] in widths for name, widths in DIGITS.legal.items())
    assert increase.of(found) <= increase.of(start) + 1e-12


def test_exchanges_come_near_the_best_scheme_of_a_small_space_and_nearer_than_the_knapsack():
    found, started = [], []
    schemes = [
        dict(zip(SMALL.legal, widths, strict=True))
        for widths in itertools.product(*SMALL.legal.values())
    ]
    for seed in range(12):
        increase, limit = JointIncrease(SMALL, model_of(SMALL, seed)), limit_at(SMALL, 0.5)
        best = min(increase.of(scheme) for scheme in schemes if SMALL.cost(scheme) <= limit)
        start = knapsack(SMALL, loss_curves(SMALL, increase.sensitivities()), limit)
        started.append(increase.of(start) / best)
        found.append(increase.of(increase.best_scheme(limit)) / best)
    assert np.median(found) < 1.1
    assert np.mean(found) < np.mean(started)


def test_a_limit_that_no_scheme_meets_is_an_error():
    increase = JointIncrease(DIGITS, model_of(DIGITS, 0))
    with pytest.raises(LimitError):
        increase.best_scheme(1)

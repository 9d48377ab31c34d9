import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.joint_limits import share_budget, tradeoff
from tests.pruning.test_joint_increase import DIGITS, model_of

LINEAR = np.array([[1.0, 0.0], [0.2, 8.0]])  # 10 for each whole base saved
CHEAP = np.array([[1.0, 0.0], [0.6, 0.4], [0.2, 4.4]])  # 1 down to 0.6, then 10


def test_what_costs_least_is_saved_first_and_the_budget_is_met():
    assert share_budget([LINEAR, CHEAP], [10, 10], 0.9) == pytest.approx([1.0, 0.8])
    assert share_budget([CHEAP, LINEAR], [5, 15], 0.9) == pytest.approx([0.6, 1.0])
    assert share_budget([CHEAP, CHEAP], [1, 1], 0.8) == pytest.approx([0.6, 1.0])


def test_a_group_without_sampling_steps_keeps_everything():
    assert share_budget([CHEAP, CHEAP], [0, 10], 0.7) == pytest.approx([1.0, 0.7])


def test_the_whole_budget_prunes_nothing_and_none_takes_the_least_models():
    assert share_budget([LINEAR, CHEAP], [10, 10], 1.0) == [1.0, 1.0]
    assert share_budget([LINEAR, CHEAP], [10, 10], 0.1) == pytest.approx([0.2, 0.2])


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=3), st.floats(0.4, 0.95))
@settings(max_examples=20)
def test_no_other_shares_within_the_budget_lose_less(seeds, mean_share):
    curves = [tradeoff(DIGITS, JointIncrease(DIGITS, model_of(DIGITS, seed))) for seed in seeds]
    num_steps = [3, 20, 7][: len(curves)]

    def loss(shares: list[float]) -> float:
        falling = zip(curves, shares, num_steps, strict=True)
        return sum(
            steps * np.interp(-share, -curve[:, 0], curve[:, 1]) for curve, share, steps in falling
        )

    shares = share_budget(curves, num_steps, mean_share)
    spent = sum(share * steps for share, steps in zip(shares, num_steps, strict=True))
    assert spent == pytest.approx(mean_share * sum(num_steps))
    for one, other in itertools.permutations(range(len(curves)), 2):
        moved = list(shares)  # some macs from one group to another
        moved[one] += 0.05 / num_steps[one]
        moved[other] -= 0.05 / num_steps[other]
        if moved[one] <= 1 and moved[other] >= curves[other][-1, 0]:
            assert loss(moved) >= loss(shares) - 1e-9


def test_a_tradeoff_is_convex_and_falls_from_the_base_to_the_smallest_model():
    curve = tradeoff(DIGITS, JointIncrease(DIGITS, model_of(DIGITS, 0)))
    assert curve[0].tolist() == [1.0, 0.0]
    assert curve[-1, 0] == DIGITS.cost(DIGITS.smallest) / DIGITS.cost_base
    slopes = np.diff(curve[:, 1]) / np.diff(-curve[:, 0])
    assert (np.diff(slopes) > 0).all()
    assert (np.diff(curve[:, 0]) < 0).all()

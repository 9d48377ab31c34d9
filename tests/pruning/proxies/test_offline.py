import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.errors import LimitError
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.knapsack import (
    FREE_CHARGE,
    extend_sensitivities,
    knapsack,
    loss_curves,
    step_worth,
)
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.proxies.offline import propose_offline
from tdc_ray.pruning.proxy import ProposalRequest, Sensitivities
from tdc_ray.pruning.space import Scheme, Space, is_tight, space_of
from tests.pruning.requests import TASK
from tests.small import TINY

SPACES = {
    "inner": space_of(TINY),
    "full": space_of(TINY, "full"),
    "digits": space_of(architecture("digits")),
}
SMALL = space_of(
    {
        **TINY,
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "mid_block_type": None,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
)
"""So few schemes that all can be tried."""

seeds = st.integers(0, 10**6)
shares = st.floats(0.02, 0.98)


def limit_at(space: Space, share: float) -> int:
    return space.macs(space.smallest) + round(
        share * (space.macs_base - space.macs(space.smallest))
    )


def random_sensitivities(space: Space, seed: int) -> Sensitivities:
    """Growing losses, with some noise: a few fall, or are below 0."""
    draw = np.random.default_rng(seed)
    found = {}
    for unit in space.units:
        widths = sorted({int(w) for w in draw.integers(1, unit.width + 1, 4)} - {unit.width})
        scale = 10 ** draw.uniform(-4, 0)
        found[unit.name] = {
            w: float(scale * (1 - w / unit.width) ** 2 * draw.uniform(-0.2, 2)) for w in widths
        }
    return found


def even_sensitivities(space: Space, **dear: float) -> dict[str, dict[int, float]]:
    """Losses that grow with the macs cut, some of them more, by number as ``u3=10``."""
    factors = {space.units[int(name[1:])].name: factor for name, factor in dear.items()}
    found = {}
    for unit in space.units:
        step = space.macs_table.slope(unit.name, space.full) / space.macs_base
        factor = factors.get(unit.name, 1.0)
        found[unit.name] = {
            w: factor * 0.1 * step * (unit.width - w) ** 1.5 for w in range(1, unit.width)
        }
    return found


def task_of(space: Space, share: float, sensitivities: Sensitivities, seed: int = 0, **changes):
    return replace(
        TASK,
        space=space,
        limit=limit_at(space, share),
        sensitivities=sensitivities,
        seed=seed,
        **{"num_candidates": 3, **changes},
    )


def remembered(
    task: ProposalRequest,
    scheme: Scheme,
    loss: float,
    *,
    group: int | None = None,
    candidate: int = 0,
) -> MemoryEntry:
    return MemoryEntry(
        group=task.group if group is None else group,
        round=0,
        candidate=candidate,
        source="offline",
        widths=scheme,
        macs=task.space.macs(scheme),
        num_params=1,
        loss_cut=9.0,
        loss_refit=loss,
    )


def propose(task: ProposalRequest, memory: Sequence[MemoryEntry] = ()) -> list[Scheme]:
    return propose_offline(task, memory)


def growth(task: ProposalRequest, scheme: Scheme, **factors: float) -> float:
    """The measured growth of the loss, were units to add up, some of them times a factor."""
    names = {task.space.units[int(name[1:])].name: factor for name, factor in factors.items()}
    curves = loss_curves(task.space, task.sensitivities)
    return sum(names.get(name, 1.0) * float(curves[name][width]) for name, width in scheme.items())


# --- proposals -------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.sampled_from(list(SPACES.values())), seeds, shares, st.integers(1, 5))
def test_proposals_of_three_rounds_are_tight_within_the_limit_and_never_repeated(
    space, seed, share, num_candidates
):
    sensitivities = random_sensitivities(space, seed)
    memory: list[MemoryEntry] = []
    for round_ in range(3):
        task = task_of(space, share, sensitivities, seed + round_, num_candidates=num_candidates)
        found = propose(task, memory)
        assert len(found) <= num_candidates
        assert all(is_tight(space, scheme, task.limit) for scheme in found)
        tried = [entry.widths for entry in memory] + list(found)
        assert all(scheme not in tried[:place] for place, scheme in enumerate(tried))
        losses = np.random.default_rng(seed + round_).uniform(0.01, 2, len(found))
        memory += [
            replace(remembered(task, scheme, float(loss), candidate=place), round=round_)
            for place, (scheme, loss) in enumerate(zip(found, losses, strict=True))
        ]
    assert memory


@pytest.mark.slow
@settings(max_examples=20)
@given(st.sampled_from(list(SPACES.values())), seeds, shares)
def test_the_same_question_gets_the_same_proposals(space, seed, share):
    task = task_of(space, share, random_sensitivities(space, seed), seed)
    found = propose(task)
    assert propose(task) == found
    memory = [remembered(task, scheme, 0.1 + n, candidate=n) for n, scheme in enumerate(found)]
    assert propose(task, memory) == propose(task, memory)


def test_another_seed_gets_other_draws_after_the_same_likeliest_scheme():
    space = SPACES["digits"]
    found = [
        propose(task_of(space, 0.5, even_sensitivities(space), seed, num_candidates=4))
        for seed in range(4)
    ]
    assert all(schemes[0] == found[0][0] for schemes in found)
    assert all(len(schemes) == 4 for schemes in found)
    assert all(one[1:] != other[1:] for one, other in itertools.combinations(found, 2))


@settings(max_examples=20)
@given(seeds, shares)
def test_the_first_proposal_without_a_memory_is_the_knapsack_of_what_was_measured(seed, share):
    space = SPACES["inner"]
    task = task_of(space, share, random_sensitivities(space, seed))
    curves = loss_curves(space, task.sensitivities)
    expected = knapsack(space, curves, task.limit, np.ones(len(space.units)))
    assert propose(task)[0] == expected


def test_where_there_is_nothing_else_to_try_there_are_fewer_proposals_than_asked_for():
    space = SPACES["inner"]
    task = replace(task_of(space, 0.5, even_sensitivities(space)), limit=space.macs_base)
    assert propose(task) == [space.full]
    assert propose(task, [remembered(task, space.full, 0.1)]) == []


@pytest.mark.parametrize("name", SPACES)
def test_a_limit_that_no_scheme_meets_is_an_error(name):
    space = SPACES[name]
    task = replace(
        task_of(space, 0.5, even_sensitivities(space)), limit=space.macs(space.smallest) - 1
    )
    with pytest.raises(LimitError):
        propose(task)


# --- the knapsack ----------------------------------------------------------------------------


ALL = np.array(list(itertools.product(*(range(1, unit.width + 1) for unit in SMALL.units))))
"""The widths of every scheme."""

MACS = np.array([SMALL.macs(dict(zip(SMALL.full, widths, strict=True))) for widths in ALL])


@settings(max_examples=30)
@given(seeds, shares)
def test_the_knapsack_is_optimal_within_one_step(seed, share):
    limit = limit_at(SMALL, share)
    factors = np.random.default_rng(seed).uniform(0.3, 2.0, len(SMALL.units))
    curves = loss_curves(SMALL, random_sensitivities(SMALL, seed))
    values = step_worth(SMALL, curves, factors)
    found = knapsack(SMALL, curves, limit, factors)
    worth = np.stack([np.cumsum(values[unit.name][::-1])[::-1] for unit in SMALL.units])
    lost = np.concatenate([worth[:, 1:], np.zeros((len(worth), 1))], axis=1)
    costs = lost[np.arange(len(worth)), ALL - 1].sum(1)
    least = costs[limit >= MACS].min()
    one_step = max(max(steps) for steps in values.values())
    cost = sum(sum(values[name][width:]) for name, width in found.items())
    assert least - 1e-12 <= cost <= least + one_step + 1e-12


def test_units_that_cost_nothing_are_cut_first_and_dear_ones_last():
    space = SPACES["inner"]
    sensitivities = even_sensitivities(space, u0=1000, u1=0, u5=0)
    free = [space.units[1].name, space.units[5].name]
    ones = {**space.full, **dict.fromkeys(free, 1)}
    task = replace(task_of(space, 0.5, sensitivities), limit=space.macs(ones))
    assert propose(task)[0] == ones
    tighter = replace(task, limit=limit_at(space, 0.3))
    scheme = propose(tighter)[0]
    assert all(scheme[name] == 1 for name in free)
    assert scheme[space.units[0].name] == space.units[0].width


def test_of_equal_losses_what_saves_more_macs_is_cut():
    space = SPACES["inner"]
    same = {unit.name: {1: 0.01} for unit in space.units}
    task = replace(task_of(space, 0.5, same), limit=space.macs_base - 1)
    saved = {
        u.name: (u.width - 1) * space.macs_table.slope(u.name, space.full) for u in space.units
    }
    best = max(saved, key=saved.__getitem__)
    assert propose(task)[0] == {**space.full, best: space.full[best] - 1}


# --- the curves ------------------------------------------------------------------------------


@given(st.sampled_from(list(SPACES.values())), seeds)
def test_curves_never_fall_while_a_unit_gets_narrower(space, seed):
    sensitivities = random_sensitivities(space, seed)
    for unit in space.units:
        curve = loss_curves(space, sensitivities)[unit.name]
        assert curve.shape == (unit.width + 1,)
        assert curve[-1] == 0
        assert np.all(np.diff(curve) <= 0)
        for width, grown in sensitivities[unit.name].items():
            assert curve[width] >= grown


def test_curves_go_through_what_was_measured_and_straight_between():
    unit = next(unit for unit in SPACES["inner"].units if unit.width == 8)
    curve = loss_curves(SPACES["inner"], {unit.name: {2: 0.6, 5: 0.3}})[unit.name]
    assert curve == pytest.approx([0.6, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def test_a_fall_by_noise_is_taken_out():
    unit = next(unit for unit in SPACES["inner"].units if unit.width == 8)
    curve = loss_curves(SPACES["inner"], {unit.name: {1: 0.1, 4: 0.4, 6: -0.2}})[unit.name]
    assert curve == pytest.approx([0.4, 0.4, 0.4, 0.4, 0.4, 0.1, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("growth", [math.nan, math.inf])
def test_a_growth_that_is_no_number_counts_as_the_largest_that_is(growth):
    space = SPACES["inner"]
    odd, other = (unit for unit in space.units[:2] if unit.width == 8)
    sensitivities = {odd.name: {1: growth, 4: 0.1}, other.name: {1: 0.7, 4: 0.2}}
    curve = loss_curves(space, sensitivities)[odd.name]
    assert (curve[1], curve[4]) == (0.7, 0.1)
    task = task_of(space, 0.5, even_sensitivities(space) | sensitivities)
    first = propose(task)
    memory = [remembered(task, scheme, 0.1 + n, candidate=n) for n, scheme in enumerate(first)]
    assert len(propose(task, memory)) == 3
    assert first[0][odd.name] > 1


@given(st.sampled_from(list(SPACES.values())), seeds)
def test_steps_are_worth_less_and_less_as_a_unit_widens(space, seed):
    curves = loss_curves(space, random_sensitivities(space, seed))
    for unit in space.units:
        values = step_worth(space, curves)[unit.name]
        assert len(values) == unit.width
        assert min(values) >= 0
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values))
        charge = sum(values[1:]) - curves[unit.name][0]  # the hull begins and ends on the curve
        assert -1e-12 <= charge <= FREE_CHARGE * (sum(c[0] for c in curves.values()) or 1.0)


def test_where_nothing_costs_anything_there_are_still_different_schemes():
    space = SPACES["inner"]
    free = {unit.name: {1: 0.0} for unit in space.units}
    found = propose(task_of(space, 0.8, free, num_candidates=4))
    assert len({tuple(scheme.items()) for scheme in found}) == 4


# --- learning from the memory bank -----------------------------------------------------------


@pytest.mark.parametrize("number", [3, 8])
def test_a_unit_that_costs_more_than_measured_is_kept_more(number):
    space = SPACES["inner"]
    unit = space.units[number]
    task = task_of(space, 0.5, even_sensitivities(space), num_candidates=6)
    first = propose(task)
    assert first[0][unit.name] < unit.width
    memory = [
        remembered(
            task,
            scheme,
            task.loss_base + growth(task, scheme, **{f"u{number}": 10.0}),
            candidate=place,
        )
        for place, scheme in enumerate(first)
    ]
    assert propose(task, memory)[0][unit.name] > first[0][unit.name]


@pytest.mark.parametrize("number", [3, 8])
def test_a_unit_that_costs_less_than_measured_is_kept_less(number):
    space = SPACES["inner"]
    unit = space.units[number]
    task = task_of(space, 0.5, even_sensitivities(space), num_candidates=6)
    first = propose(task)
    memory = [
        remembered(
            task,
            scheme,
            task.loss_base + growth(task, scheme, **{f"u{number}": 0.1}),
            candidate=place,
        )
        for place, scheme in enumerate(first)
    ]
    assert propose(task, memory)[0][unit.name] < first[0][unit.name]


def test_losses_as_predicted_times_anything_change_no_mind():
    space = SPACES["inner"]
    task = task_of(space, 0.5, random_sensitivities(space, 0), num_candidates=4)  # no ties
    first = propose(task)
    for factor in (0.2, 5.0):  # units disturb each other: all of them grow alike
        memory = [
            remembered(task, scheme, task.loss_base + factor * growth(task, scheme), candidate=n)
            for n, scheme in enumerate(first[1:])
        ]
        assert propose(task, memory)[0] == first[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e30, 0.0, -1.0])
def test_losses_that_tell_nothing_are_survived(loss):
    space = SPACES["inner"]
    task = task_of(space, 0.5, even_sensitivities(space))
    first = propose(task)
    memory = [remembered(task, scheme, loss, candidate=n) for n, scheme in enumerate(first)]
    for others in ([], [remembered(task, first[0], task.loss_base + 0.01, group=1)]):
        found = propose(task, memory + others)
        assert len(found) == 3
        assert all(is_tight(space, scheme, task.limit) for scheme in found)
        assert not any(scheme in first for scheme in found)


def test_a_loss_that_is_no_number_does_not_hide_the_others():
    space = SPACES["inner"]
    task = task_of(space, 0.5, even_sensitivities(space), num_candidates=6)
    first = propose(task)
    losses = [task.loss_base + growth(task, scheme, u2=10.0) for scheme in first]
    memory = [
        remembered(task, scheme, loss, candidate=place)
        for place, (scheme, loss) in enumerate(zip(first, losses, strict=True))
    ]
    spoilt = replace(memory[-1], loss_refit=math.nan)
    found = propose(task, [*memory[:-1], spoilt])
    assert found[0] == propose(task, memory[:-1])[0]
    assert found[0] != first[0]


# --- other groups ----------------------------------------------------------------------------


def schemes_of_others(space: Space, share: float, number: int) -> list[Scheme]:
    """Schemes at another limit that no knapsack over even losses results in."""
    return [
        propose(task_of(space, share, random_sensitivities(space, seed)))[0]
        for seed in range(number)
    ]


def test_the_best_scheme_of_the_nearest_group_comes_second_brought_to_the_limit():
    space = SPACES["inner"]
    task = task_of(space, 0.5, even_sensitivities(space), group=4)
    schemes = schemes_of_others(space, 0.5, 4)
    memory = [
        remembered(task, schemes[0], 0.001, group=1),
        remembered(task, schemes[1], 0.9, group=3),
        remembered(task, schemes[2], 0.2, group=3, candidate=1),
        remembered(task, schemes[3], 0.001, group=8),
    ]
    alone = propose(task)
    assert propose(task, memory)[:2] == [alone[0], schemes[2]]  # it fits just so


def test_of_two_nearest_groups_the_noisier_is_followed():
    space = SPACES["inner"]
    task = task_of(space, 0.5, even_sensitivities(space), group=4)
    below, above = schemes_of_others(space, 0.5, 2)
    memory = [remembered(task, below, 0.1, group=3), remembered(task, above, 0.9, group=5)]
    assert propose(task, memory)[1] == above


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_scheme_of_another_limit_is_brought_to_this_one(share):
    space = SPACES["inner"]
    task = task_of(space, 0.5, even_sensitivities(space))
    (other,) = schemes_of_others(space, share, 1)
    second = propose(task, [remembered(task, other, 0.1, group=task.group + 1)])[1]
    assert is_tight(space, second, task.limit)
    pairs = [(second[name], other[name]) for name in other]
    assert all(ours >= theirs for ours, theirs in pairs) or share > 0.5
    assert all(ours <= theirs for ours, theirs in pairs) or share < 0.5


def test_losses_of_other_groups_teach_nothing_of_this_one():
    space = SPACES["inner"]
    task = task_of(space, 0.5, even_sensitivities(space), num_candidates=1)
    memory = [
        remembered(task, scheme, 1.0 + seed, group=task.group + 1, candidate=seed)
        for seed, scheme in enumerate(schemes_of_others(space, 0.5, 4))
    ]
    assert propose(task, memory) == propose(task)


# --- measuring further -----------------------------------------------------------------------


def test_what_was_measured_on_a_cut_model_follows_what_led_there():
    space = SPACES["digits"]
    name, other, third = (unit.name for unit in space.units[:3])
    widths = {unit.name: unit.width for unit in space.units}
    known = {name: {1: 8.0, 2: 4.0}, other: {1: 1.0}, third: {1: 2.0}}
    curves = loss_curves(space, known)
    start = {**widths, name: 3, other: 1}
    found = extend_sensitivities(known, curves, start, {name: {1: 5.0, 2: 1.0}, third: {1: 7.0}})
    until = curves[name][3]
    assert 0 < until < 4.0
    assert found == {
        name: {1: until + 5.0, 2: until + 1.0, 3: until},  # wider than 3 nothing was measured
        other: {1: 1.0},  # as narrow as can be: not measured again
        third: {1: 7.0},  # unpruned in the pruned model: measured anew
    }
    assert loss_curves(space, found)[name].tolist()[3] == until

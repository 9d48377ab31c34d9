"""Widths in multiples of channels, and limits of time, over random schemes."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.config.prune import PruneConfig
from tdc_ray.errors import ConfigError, LimitError
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.changes import Bound, Change, Planner
from tdc_ray.pruning.costs import LatencyTable
from tdc_ray.pruning.knapsack import loss_curves, step_worth
from tdc_ray.pruning.latency import LatencyResult, _schemes, latency_table
from tdc_ray.pruning.llm.prompt import messages_for
from tdc_ray.pruning.proxies.by_score import BASELINES, sorted_scores
from tdc_ray.pruning.proxies.offline import propose_offline
from tdc_ray.pruning.sensitivity import levels
from tdc_ray.pruning.space import Space, fit_to_limit, is_tight, space_of
from tests.pruning.requests import task
from tests.small import TINY_DIT


def timed(space: Space, seed: int) -> Space:
    """Random times that never fall with the width; some widths save nothing."""
    draw = random.Random(seed)
    times = {}
    for unit in space.units:
        steps = [draw.choice((0, draw.randint(1, 2000))) for _ in range(unit.width)]
        times[unit.name] = [0, *(1000 + sum(steps[: w + 1]) for w in range(unit.width))]
    return space.timed(LatencyTable(50_000, times))


INNER = [space_of(architecture(name), "inner", m) for name in ("tiny", "digits") for m in (8, 16)]
SPACES = [*INNER, space_of(architecture("iddpm-cifar10"), "inner", 64)]
SPACES += [space_of(architecture("digits"), "full", 16)]
DEPTH = [space_of(TINY_DIT, "depth"), space_of(TINY_DIT, "depth", 16)]
SPACES += DEPTH
SPACES += [
    timed(space, seed)
    for seed, space in enumerate([space_of(architecture("tiny")), *INNER, *DEPTH])
]

spaces, seeds = st.sampled_from(SPACES), st.integers(0, 2**32)


def task_of(space: Space, seed: int):
    draw = random.Random(seed)
    least = space.cost(space.smallest)
    return task(
        space=space,
        limit=least + round(draw.random() * (space.cost_base - least)),
        scores={u.name: [draw.random() for _ in range(u.width)] for u in space.units},
        sensitivities={u.name: {w: draw.random() for w in levels(u, 4)} for u in space.units},
        seed=seed,
    )


def assert_legal_and_tight(space: Space, scheme, limit: int) -> None:
    """Said again, without the space's own words."""
    assert scheme.keys() == space.full.keys()
    assert space.cost(scheme) <= limit
    for unit in space.units:
        width, multiple = scheme[unit.name], unit.multiple
        assert width == unit.width or width * unit.channels % multiple == 0
        wider = next((w for w in space.legal[unit.name] if w > width), None)
        assert wider is None or space.cost({**scheme, unit.name: wider}) > limit


@settings(max_examples=40)
@given(spaces, seeds)
def test_all_schemes_that_are_proposed_or_repaired_are_legal_and_tight(space, seed):
    asked, draw = task_of(space, seed), random.Random(seed)
    values = step_worth(space, loss_curves(space, asked.sensitivities))
    wished = {unit.name: draw.randint(1, unit.width) for unit in space.units}
    found = [fit_to_limit(space, wished, asked.limit, values), *propose_offline(asked, [])]
    found += [make(space, asked.limit, sorted_scores(asked.scores)) for make in BASELINES.values()]
    for scheme in found:
        assert_legal_and_tight(space, scheme, asked.limit)
        assert is_tight(space, scheme, asked.limit)
        assert fit_to_limit(space, scheme, asked.limit, values) == scheme


@pytest.mark.parametrize("space", [*SPACES[:6], *DEPTH])
def test_units_are_measured_at_legal_widths_alone(space):
    assert any(levels(unit, 4) for unit in space.units)
    for unit in space.units:
        assert set(levels(unit, 4)) <= set(space.legal[unit.name]) - {unit.width}


def test_without_a_multiple_every_width_is_legal():
    space = space_of(architecture("digits"))
    assert all(legal == tuple(range(1, legal[-1] + 1)) for legal in space.legal.values())
    assert {len(legal) for legal in space.legal.values()} == {4, 8}


def test_a_limit_below_the_least_legal_scheme_names_the_multiple():
    space, free = (space_of(architecture("digits"), "inner", multiple) for multiple in (16, 1))
    assert space.macs(space.smallest) > free.macs(free.smallest)
    with pytest.raises(LimitError, match=r"prune\.channel_multiple 16"):
        space.check_limit(space.macs(space.smallest) - 1, "group 0")


def test_a_language_model_is_told_legal_widths_and_kept_to_them():
    space = space_of(architecture("tiny"), "inner", 8)
    asked, (first, *_) = task_of(space, 0), space.units
    assert space.legal[first.name] == (4, 8)
    planner = Planner(asked, [])
    text = messages_for(asked, [], planner, max_entries=0, max_predictions=0)[1]["content"]
    assert "\n0 | down 0 | residual | 8x8 | 4, 8 | " in text
    planned = planner.plan(Change(bounds=[Bound(unit=0, least=3, most=3)]))
    assert "no legal width is left" in planned.notes[0]
    assert_legal_and_tight(space, planned.scheme, asked.limit)


def test_branches_that_may_go_are_measured_without_and_a_language_model_is_told():
    space = DEPTH[1]
    assert {unit.kind: space.legal[unit.name] for unit in space.units} == {
        "attention": (0, 2, 4),
        "feed-forward": (*range(0, 129, 16),),
    }
    assert all(0 in levels(unit, 4) for unit in space.units)
    assert space.smallest == dict.fromkeys(space.full, 0)
    asked = replace(task_of(space, 0), limit=space.cost_base // 2)
    planner = Planner(asked, [])
    text = messages_for(asked, [], planner, max_entries=0, max_predictions=0)[1]["content"]
    assert "\n0 | transformer 0 | attention | 4x4 | 0, 2, 4 | " in text
    assert "At width 0 the attention or feed-forward is removed as a whole" in text
    gone = planner.plan(Change(bounds=[Bound(unit=0, least=0, most=0)]))
    assert not gone.notes
    assert gone.scheme[space.units[0].name] == 0
    assert_legal_and_tight(
        replace(space, legal={**space.legal, space.units[0].name: (0,)}), gone.scheme, asked.limit
    )


def test_times_are_measured_where_all_branches_are_there():
    assert all(widths > 0 for scheme in _schemes(DEPTH[0]) for widths in scheme.values())
    assert _schemes(DEPTH[0]) == _schemes(space_of(TINY_DIT))


def test_measured_times_rise_with_the_width_and_lie_on_lines_in_between():
    units = space_of(architecture("tiny")).units[:1]
    name = units[0].name
    times = {name: {2: 100, 4: 300, 5: 260, 7: 500, 8: 450}}
    measured = LatencyResult("cpu", 1, base_ns=1000, units=times, seconds=1.0)
    table = latency_table(measured, units)
    assert table.times[name] == (0, 100, 100, 190, 280, 280, 365, 450, 450)
    assert table.rest == 550
    assert table.total({name: 8}) == 1000
    assert table.time_saving_widths(name, tuple(range(1, 9))) == (2, 3, 5, 6, 8)
    assert table.time_saving_widths(name, (4, 8)) == (4, 8)


def test_a_time_limit_on_streams_is_refused():
    with pytest.raises(
        ConfigError, match=r"prune\.space must be inner or depth .* got full.*macs"
    ):
        PruneConfig(objective="latency", space="full")

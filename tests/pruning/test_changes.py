import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.changes import MAX_NOTE, Bound, Change, Distrust, Move, Planner, Share
from tdc_ray.pruning.knapsack import knapsack, loss_curves
from tdc_ray.pruning.space import Space, space_of
from tests.pruning.requests import NAMES, SPACE, entry, task
from tests.small import TINY_DIT

STEEP = {
    unit.name: {
        width: 1e-4 * (1 + number % 3) * (1 - width / unit.width) ** 2
        for width in range(1, unit.width)
    }
    for number, unit in enumerate(SPACE.units)
}
REQUEST = task(sensitivities=STEEP)
PLANNER = Planner(REQUEST, ())
FULL = space_of(architecture("tiny"), "full")

numbers = st.integers(-2, len(NAMES) + 1)
places = st.sampled_from([*map(str, range(14)), *PLANNER.blocks, "up", "mids", "²", ""])
values = st.floats(-5, 40)
changes = st.builds(
    Change,
    bounds=st.lists(
        st.builds(Bound, unit=numbers, least=st.integers(-1, 9), most=st.integers(-1, 9))
    ),
    distrust=st.lists(st.builds(Distrust, where=places, factor=values)),
    moves=st.lists(st.builds(Move, from_block=places, to_block=places, points=values), max_size=3),
    shares=st.lists(st.builds(Share, block=places, least=values, most=values), max_size=3),
)


def cost_of(space: Space, scheme: dict[str, int], names: list[str]) -> int:
    return sum(space.costs.marginal_cost(name, 0, scheme[name], scheme) for name in names)


@settings(max_examples=60)
@given(changes, st.floats(0.3, 0.95), st.sampled_from([SPACE, FULL]))
def test_whatever_is_said_the_scheme_is_legal_and_within_the_limit(change, share, space):
    limit = max(round(share * space.macs_base), space.macs(space.smallest))
    planner = Planner(replace(REQUEST, space=space, limit=limit, sensitivities={}), ())
    planned = planner.plan(change)
    assert planned.scheme.keys() == space.full.keys()
    assert all(width in space.legal[name] for name, width in planned.scheme.items())
    assert space.cost(planned.scheme) <= limit
    steps = max(max(space.step_costs(unit.name)) for unit in space.units)
    assert limit - space.cost(planned.scheme) < steps  # nothing but a part of a step is left over
    points = planner.points(planned.scheme)
    for share in change.shares:
        if not any(note.startswith(str(share)) for note in planned.notes):
            taken = sum(p for block, p in points.items() if block.startswith(share.block.strip()))
            assert share.least - 1e-9 <= taken <= share.most + 1e-9


def test_what_the_branches_of_a_block_have_in_common_counts_as_the_blocks():
    space = space_of(TINY_DIT, "depth")
    planner = Planner(replace(REQUEST, space=space, limit=space.macs_base, sensitivities={}), ())
    block = "transformer 1"
    gone = {**space.full, **dict.fromkeys(planner.blocks[block], 0)}
    saved = space.macs_base - space.macs(gone)
    assert saved > cost_of(space, space.full, planner.blocks[block])
    assert planner.points(space.full)[block] == pytest.approx(100 * saved / space.macs_base)


def test_without_changes_it_is_the_knapsack():
    alone = knapsack(SPACE, loss_curves(SPACE, STEEP), REQUEST.limit)
    assert PLANNER.start.scheme == alone
    assert PLANNER.plan(Change()).notes == ()
    assert "the knapsack's own" in PLANNER.objection(PLANNER.plan(Change()))


def test_a_pin_holds_and_the_rest_is_the_best_under_it():
    width = PLANNER.start.scheme[NAMES[6]]
    planned = PLANNER.plan(Change(bounds=[Bound(unit=6, least=width + 2, most=width + 2)]))
    assert planned.scheme[NAMES[6]] == width + 2
    assert planned.notes == ()
    assert planned.increase > PLANNER.start.increase
    assert PLANNER.objection(planned) is None


def test_contradictory_changes_are_dropped_one_by_one_and_said():
    bounds = [Bound(unit=3, least=2, most=2), Bound(unit=3, least=5, most=6)]
    bounds += [Bound(unit=99, least=1, most=1), Bound(unit=4, least=9, most=9)]
    bounds += [Bound(unit=number, least=8, most=8) for number in (0, 1, 5, 6, 8, 10, 11)]
    planned = PLANNER.plan(Change(bounds=bounds))
    assert planned.scheme[NAMES[3]] == 2
    said = "\n".join(planned.notes)
    assert "unit 3 within 5 to 6: no legal width is left, or it contradicts" in said
    assert "unit 99 within 1 to 1: there is no such unit" in said
    assert "unit 4 within 9 to 9: no legal width is left" in said
    assert "no scheme would be within the limit" in said
    assert planned.scheme[NAMES[0]] == 8  # the first of those that together do not fit


def test_what_would_leave_a_part_of_the_limit_is_dropped():
    bounds = [Bound(unit=number, least=1, most=1) for number in range(len(NAMES))]
    planned = PLANNER.plan(Change(bounds=bounds))
    assert any("a part of the limit would be left over" in note for note in planned.notes)
    assert planned.scheme[NAMES[0]] == 1


def test_distrust_of_a_block_makes_it_wider_and_of_a_unit_it_alone():
    up = [NAMES.index(name) for name in PLANNER.blocks["up 1"]]
    for where, names in (("up 1", up), (str(up[0]), up[:1])):
        planned = PLANNER.plan(Change(distrust=[Distrust(where=where, factor=9)]))
        assert all(planned.scheme[NAMES[n]] > PLANNER.start.scheme[NAMES[n]] for n in names)
        less = PLANNER.plan(Change(distrust=[Distrust(where=where, factor=0.1)]))
        assert all(less.scheme[NAMES[n]] < PLANNER.start.scheme[NAMES[n]] for n in names)
    for bad in (Distrust(where="up 9", factor=2), Distrust(where="1", factor=11)):
        assert len(PLANNER.plan(Change(distrust=[bad])).notes) == 1


def test_factors_on_a_unit_stay_in_their_range_together():
    up = NAMES.index(PLANNER.blocks["up 1"][0])
    allowed = [Distrust(where=str(up), factor=2), Distrust(where="up 1", factor=5)]
    assert PLANNER.plan(Change(distrust=allowed)).notes == ()
    planned = PLANNER.plan(Change(distrust=[*allowed, Distrust(where="up", factor=1.5)]))
    assert planned.notes == (
        "factor 1.5 on up: all factors on a unit together must be within 0.1 to 10",
    )
    assert planned.scheme == PLANNER.plan(Change(distrust=allowed)).scheme


def test_a_move_takes_points_from_one_block_to_another():
    planned = PLANNER.plan(Change(moves=[Move(from_block=" mid", to_block="up 1", points=4)]))
    assert planned.notes == ()
    for block, expected in (("mid", -4), ("up 1", 4)):
        before, after = (
            cost_of(SPACE, scheme, PLANNER.blocks[block])
            for scheme in (PLANNER.start.scheme, planned.scheme)
        )
        assert 100 * (after - before) / SPACE.cost_base == pytest.approx(expected, abs=1.5)
    planned = PLANNER.plan(Change(moves=[Move(from_block="down", to_block="mid", points=5)]))
    before, after = (PLANNER.points(one.scheme) for one in (PLANNER.start, planned))
    moved = {name: after[name] - before[name] for name in before}
    assert sum(moved[name] for name in moved if "down" in name) == pytest.approx(-5, abs=1.5)
    assert moved["mid"] == pytest.approx(5, abs=1.5)
    overlap = PLANNER.plan(Change(moves=[Move(from_block="up", to_block="up 1", points=1)]))
    assert "there are no two such blocks" in overlap.notes[0]
    far = PLANNER.plan(Change(moves=[Move(from_block="mid", to_block="up 1", points=80)]))
    assert far.notes[0].startswith("80 points from mid to up 1: done in part, only ")
    assert far.scheme != PLANNER.start.scheme


def test_a_move_of_which_nothing_is_done_is_dropped_and_one_that_is_dropped_is_not_done_in_part():
    wide = replace(REQUEST, limit=SPACE.macs_base)
    whole = Planner(wide, ()).plan(Change(moves=[Move(from_block="mid", to_block="up", points=3)]))
    assert whole.notes == ("3 points from mid to up: nothing could be moved",)
    narrow = [Bound(unit=NAMES.index(name), least=1, most=1) for name in PLANNER.blocks["up 1"]]
    far = Move(from_block="mid", to_block="up 1", points=80)
    contradicted = PLANNER.plan(Change(bounds=narrow, moves=[far])).notes
    assert [note for note in contradicted if note.startswith(str(far))] == [
        f"{far}: no legal width is left, or it contradicts an earlier one"
    ]


@pytest.mark.parametrize("block", ["mid", "up 1", "up"])
def test_a_share_is_kept_exactly_and_the_rest_is_the_best_under_it(block):
    def taken(scheme: dict[str, int]) -> float:
        return sum(p for name, p in PLANNER.points(scheme).items() if name.startswith(block))

    usual = taken(PLANNER.start.scheme)
    less = PLANNER.plan(Change(shares=[Share(block=block, least=0, most=usual - 3)]))
    more = PLANNER.plan(Change(shares=[Share(block=block, least=usual + 3, most=100)]))
    assert (less.notes, more.notes) == ((), ())
    assert usual - 4.5 < taken(less.scheme) <= usual - 3
    assert usual + 3 <= taken(more.scheme) < usual + 4.5
    same = Share(block=block, least=usual - 1e-6, most=usual + 1e-6)
    kept = PLANNER.plan(Change(shares=[same]))
    assert kept.scheme == PLANNER.start.scheme


def test_a_share_that_no_widths_have_is_dropped_and_said():
    for least, most in ((0, 0), (99, 100), (8, 7)):
        planned = PLANNER.plan(Change(shares=[Share(block="mid", least=least, most=most)]))
        assert "points for mid: the nearest that it can have are" in planned.notes[0]
        assert planned.scheme == PLANNER.start.scheme
    (note,) = PLANNER.plan(Change(shares=[Share(block="out", least=0, most=9)])).notes
    assert note == "0 to 9 points for out: there is no such block"
    planner = Planner(replace(REQUEST, space=FULL, sensitivities={}), ())
    (note,) = planner.plan(Change(shares=[Share(block="mid", least=0, most=9)])).notes
    assert "no shares where a stream's width is cut" in note


def test_a_change_that_cannot_be_read_discards_itself_alone():
    document = {
        "reasoning": None,
        "hypothesis": None,
        "bounds": [{"unit": "mid", "least": 1, "most": 1}, {"unit": 3, "least": 2, "most": 2}],
        "distrust": [{"where": 4, "factor": "NaN"}, {"where": 4, "factor": 2}, "all"],
        "moves": None,
    }
    change = Change.model_validate_json(json.dumps(document))
    assert (change.reasoning, change.hypothesis) == ("", "")
    assert change.bounds == [Bound(unit=3, least=2, most=2)]
    assert change.distrust == [Distrust(where="4", factor=2)]
    assert len(change.dropped) == 3
    assert PLANNER.plan(change).notes == tuple(change.dropped)


def test_what_is_said_of_a_huge_number_is_short():
    planned = PLANNER.plan(Change(bounds=[Bound(unit=3, least=10**4000, most=1)]))
    assert [len(note) for note in planned.notes] == [MAX_NOTE]


def test_measurements_correct_what_is_predicted():
    measured = entry(2, REQUEST.loss_base + 3 * PLANNER.start.increase, u3=1)
    measured = replace(measured, widths=PLANNER.start.scheme)
    learned = Planner(REQUEST, [measured, entry(1, 9.0, u0=1)]).predictor
    scheme = PLANNER.start.scheme
    assert learned.increase(scheme) == pytest.approx(3 * PLANNER.start.increase, rel=0.02)
    assert learned.standard_error(scheme) / learned.increase(scheme) < 0.15
    assert PLANNER.start.standard_error / PLANNER.start.increase > 0.15
    change, error = learned.change(0, 8, 4)
    assert change == pytest.approx(3 * STEEP[NAMES[0]][4], rel=0.3)
    assert 0 < error < change

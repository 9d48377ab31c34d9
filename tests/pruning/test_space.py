import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.errors import LimitError
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.space import Space, Values, fit_to_limit, is_tight, space_of
from tests.small import TINY

NAMES = ("tiny", "digits", "iddpm-cifar10")
SPACES = {name: space_of(architecture(name)) for name in NAMES}
SPACES["one-head"] = space_of({**TINY, "attention_head_dim": None})
SPACES |= {f"{name}-full": space_of(architecture(name), "full") for name in NAMES}

spaces = st.sampled_from(list(SPACES.values()))
seeds = st.integers(0, 2**32)
shares = st.floats(0, 1)


def random_scheme(space: Space, draw: random.Random) -> dict[str, int]:
    return {unit.name: draw.randint(1, unit.width) for unit in space.units}


def random_values(space: Space, draw: random.Random) -> Values:
    """Falling, some of them equal, some 0."""
    return {
        unit.name: sorted(
            (draw.choice((0.0, 1.0, draw.random())) for _ in range(unit.width)), reverse=True
        )
        for unit in space.units
    }


def equal_values(space: Space) -> Values:
    return {unit.name: [1.0] * unit.width for unit in space.units}


def limit_at(space: Space, share: float) -> int:
    """A limit between the smallest scheme's macs and the base's."""
    return space.macs(space.smallest) + round(
        share * (space.macs_base - space.macs(space.smallest))
    )


@given(spaces, seeds, shares)
def test_a_repaired_scheme_is_within_the_limit_and_tight(space, seed, share):
    draw, limit = random.Random(seed), limit_at(space, share)
    repaired = fit_to_limit(space, random_scheme(space, draw), limit, random_values(space, draw))
    assert repaired.keys() == space.full.keys()
    assert all(1 <= repaired[unit.name] <= unit.width for unit in space.units)
    assert space.macs(repaired) <= limit
    for unit in space.units:  # what is_tight says, said again
        wider = {**repaired, unit.name: repaired[unit.name] + 1}
        assert repaired[unit.name] == unit.width or space.macs(wider) > limit
    assert is_tight(space, repaired, limit)


@given(spaces, seeds, shares)
def test_a_tight_scheme_is_left_as_it_is(space, seed, share):
    draw, limit = random.Random(seed), limit_at(space, share)
    tight = fit_to_limit(space, random_scheme(space, draw), limit, random_values(space, draw))
    assert fit_to_limit(space, tight, limit, random_values(space, draw)) == tight


@given(spaces, seeds)
def test_a_smaller_width_never_raises_macs_or_parameters(space, seed):
    draw = random.Random(seed)
    scheme = random_scheme(space, draw)
    smaller = {name: draw.randint(1, width) for name, width in scheme.items()}
    assert (
        space.macs(space.smallest) <= space.macs(smaller) <= space.macs(scheme) <= space.macs_base
    )
    assert space.num_params(smaller) <= space.num_params(scheme) <= space.num_params_base
    assert (space.macs(smaller) == space.macs(scheme)) == (smaller == scheme)


@given(spaces, seeds, seeds)
def test_less_than_the_largest_step_of_a_limit_is_left_unused(space, seed, other):
    draw = random.Random(seed)
    limit = limit_at(space, random.Random(other).random())
    repaired = fit_to_limit(space, random_scheme(space, draw), limit, random_values(space, draw))
    largest_step = max(space.macs_table.slope(unit.name, space.full) for unit in space.units)
    assert repaired == space.full or space.macs(repaired) > limit - largest_step


def repaired_without_a_heap(space: Space, scheme, limit: int, values: Values) -> dict[str, int]:
    """The same as ``fit_to_limit``, with every choice made anew."""
    widths, full = dict(scheme), space.full
    while space.macs(widths) > limit:
        name = min(
            (name for name in widths if widths[name] > 1),
            key=lambda name: (
                values[name][widths[name] - 1] / space.macs_table.slope(name, widths),
                name,
            ),
        )
        widths[name] -= 1
    while True:
        room = limit - space.macs(widths)
        fitting = [
            name
            for name in widths
            if widths[name] < full[name] and space.macs_table.slope(name, widths) <= room
        ]
        if not fitting:
            return widths
        name = min(
            fitting,
            key=lambda name: (
                -values[name][widths[name]] / space.macs_table.slope(name, widths),
                name,
            ),
        )
        widths[name] += 1


@given(st.sampled_from(["tiny", "tiny-full", "digits-full"]), seeds, shares)
def test_repair_takes_the_best_step_at_every_turn(name, seed, share):
    space, draw = SPACES[name], random.Random(seed)
    scheme, values = random_scheme(space, draw), random_values(space, draw)
    limit = limit_at(space, share)
    expected = repaired_without_a_heap(space, scheme, limit, values)
    assert fit_to_limit(space, scheme, limit, values) == expected


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_full_scheme_is_unchanged_at_the_limit_of_the_base(space):
    assert fit_to_limit(space, space.full, space.macs_base, equal_values(space)) == space.full
    ones = dict.fromkeys(space.full, 1)
    assert fit_to_limit(space, ones, space.macs_base, equal_values(space)) == space.full


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_smallest_scheme_is_all_that_the_smallest_limit_allows(space):
    ones = dict.fromkeys(space.full, 1)
    assert fit_to_limit(space, space.full, space.macs(space.smallest), equal_values(space)) == ones


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_a_limit_below_the_smallest_scheme_is_an_error_that_names_the_numbers(space):
    limit = space.macs(space.smallest) - 1
    with pytest.raises(LimitError) as raised:
        fit_to_limit(space, space.full, limit, equal_values(space))
    for number in (limit, space.macs(space.smallest), space.macs_base):
        assert f"{number:,}" in str(raised.value)
    with pytest.raises(LimitError, match=f"^group 7 is limited to {limit:,} macs"):
        space.check_limit(limit, "group 7")
    space.check_limit(space.macs(space.smallest), "group 7")  # met by the smallest scheme


@given(spaces, seeds)
def test_a_step_makes_the_macs_that_it_is_said_to_make(space, seed):
    scheme = random_scheme(space, random.Random(seed))
    for unit in space.units:
        macs = [space.macs({**scheme, unit.name: width}) for width in range(1, unit.width + 1)]
        steps = [wider - narrower for narrower, wider in pairwise(macs)]
        assert steps == [space.macs_table.slope(unit.name, scheme)] * (unit.width - 1)


@pytest.mark.parametrize("name", ["tiny", "tiny-full"])
def test_the_step_of_the_least_value_per_mac_goes_first(name):
    space = SPACES[name]
    for unit in space.units:
        values = {**equal_values(space), unit.name: [1.0] * (unit.width - 1) + [0.0]}
        limit = space.macs_base - space.macs_table.slope(unit.name, space.full)
        assert fit_to_limit(space, space.full, limit, values) == {
            **space.full,
            unit.name: unit.width - 1,
        }


@pytest.mark.parametrize("name", ["tiny", "tiny-full"])
def test_the_step_of_the_most_value_per_mac_comes_back_first(name):
    space = SPACES[name]
    ones = dict.fromkeys(space.full, 1)
    for unit in space.units:
        values = {**equal_values(space), unit.name: [1e6] * unit.width}
        limit = space.macs(space.smallest) + space.macs_table.slope(unit.name, ones)
        repaired = fit_to_limit(space, ones, limit, values)
        assert repaired[unit.name] == 2


def test_a_scheme_that_leaves_room_or_breaks_the_limit_is_not_tight():
    space = SPACES["tiny"]
    ones = dict.fromkeys(space.full, 1)
    assert is_tight(space, space.full, space.macs_base)
    assert not is_tight(space, space.full, space.macs_base - 1)
    assert not is_tight(space, ones, space.macs_base)
    assert is_tight(space, ones, space.macs(space.smallest))

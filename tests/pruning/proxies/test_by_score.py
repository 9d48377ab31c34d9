import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.errors import LimitError
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.criteria.random import random_scores
from tdc_ray.pruning.criteria.scores import Scores
from tdc_ray.pruning.proxies.by_score import (
    BASELINES,
    baseline_schemes,
    global_scheme,
    per_mac_scheme,
    sorted_scores,
    uniform_scheme,
)
from tdc_ray.pruning.space import Space, is_tight, space_of
from tests.small import TINY_DIT

SPACE = space_of(architecture("tiny"))
SPACES = [SPACE, space_of(architecture("tiny"), "full"), space_of(architecture("digits"))]
SCORES = random_scores(SPACE.units, seed=0)

spaces = st.sampled_from(SPACES)
seeds = st.integers(0, 10**6)


def limit_at(space: Space, share: float) -> int:
    return space.macs(space.smallest) + round(
        share * (space.macs_base - space.macs(space.smallest))
    )


@settings(max_examples=40)
@given(spaces, seeds, st.floats(0, 1))
def test_baselines_are_tight_within_the_limit_and_all_different(space, seed, share):
    limit = limit_at(space, share)
    found = baseline_schemes(space, random_scores(space.units, seed), limit)
    assert found
    assert all(is_tight(space, scheme, limit) for _, scheme in found)
    schemes = [scheme for _, scheme in found]
    assert all(scheme not in schemes[:place] for place, scheme in enumerate(schemes))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_score_is_used_as_uniform_ratio_as_global_ranking_and_as_ranking_per_mac(share):
    limit, values = limit_at(SPACE, share), sorted_scores(SCORES)
    assert baseline_schemes(SPACE, SCORES, limit) == [
        ("uniform", uniform_scheme(SPACE, limit, values)),
        ("global", global_scheme(SPACE, limit, values)),
        ("global-per-mac", per_mac_scheme(SPACE, limit, values)),
    ]


def test_a_scheme_that_two_baselines_come_to_is_tried_once_under_the_first_name():
    assert baseline_schemes(SPACE, SCORES, SPACE.macs_base) == [("uniform", SPACE.full)]
    ones = dict.fromkeys(SPACE.full, 1)
    assert baseline_schemes(SPACE, SCORES, SPACE.macs(SPACE.smallest)) == [("uniform", ones)]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_uniform_scheme_is_the_largest_even_share_filled_up_to_the_limit(share):
    limit = limit_at(SPACE, share)
    even = [  # widths are 8 and 2, so a share makes a difference at every eighth
        {unit.name: max(1, unit.width * eighths // 8) for unit in SPACE.units}
        for eighths in range(1, 9)
    ]
    largest = max((scheme for scheme in even if SPACE.macs(scheme) <= limit), key=SPACE.macs)
    scheme = uniform_scheme(SPACE, limit, sorted_scores(SCORES))
    assert all(scheme[name] >= width for name, width in largest.items())
    assert is_tight(SPACE, scheme, limit)


def test_the_uniform_scheme_removes_no_branch_for_rounding_down():
    space = space_of(TINY_DIT, "depth", channel_multiple=16)
    values = sorted_scores(random_scores(space.units, seed=0))
    least = {name: widths[1] for name, widths in space.legal.items()}
    assert {widths[0] for widths in space.legal.values()} == {0}
    assert uniform_scheme(space, space.macs(least), values) == least


def ones_but(**low: float) -> Scores:
    """Scores of 1, but for all of a unit's, given by its number as ``u3=0.1``."""
    scores = {unit.name: [1.0] * unit.width for unit in SPACE.units}
    for name, value in low.items():
        unit = SPACE.units[int(name[1:])]
        scores[unit.name] = [value] * unit.width
    return scores


@pytest.mark.parametrize("scheme_for", [global_scheme, per_mac_scheme])
def test_a_ranking_cuts_the_least_score_wherever_it_is(scheme_for):
    low = SPACE.units[3]
    limit = SPACE.macs_base - (low.width - 1) * SPACE.macs_table.slope(low.name, SPACE.full)
    expected = {**SPACE.full, low.name: 1}
    assert scheme_for(SPACE, limit, sorted_scores(ones_but(u3=1e-6))) == expected


def test_a_global_ranking_heeds_the_score_alone_and_a_ranking_per_mac_what_it_saves():
    steps = [SPACE.macs_table.slope(unit.name, SPACE.full) for unit in SPACE.units]
    dear, cheap = steps.index(max(steps)), steps.index(min(steps))
    values = sorted_scores(ones_but(**{f"u{dear}": 0.9, f"u{cheap}": 0.8}))
    limit = SPACE.macs_base - min(steps)
    by_score = global_scheme(SPACE, limit, values)
    per_mac = per_mac_scheme(SPACE, limit, values)
    assert by_score == {**SPACE.full, SPACE.units[cheap].name: SPACE.units[cheap].width - 1}
    assert per_mac[SPACE.units[dear].name] == SPACE.units[dear].width - 1


def test_a_global_ranking_never_cuts_the_last_step_of_a_unit():
    scheme = global_scheme(SPACE, SPACE.macs(SPACE.smallest), sorted_scores(ones_but(u0=0.0)))
    assert min(scheme.values()) == 1


def test_values_fall_along_the_places_of_a_unit():
    assert sorted_scores({"block": [0.1, 0.7, 0.3]}) == {"block": [0.7, 0.3, 0.1]}


@pytest.mark.parametrize("name", BASELINES)
def test_a_limit_that_no_scheme_meets_is_an_error(name):
    with pytest.raises(LimitError):
        BASELINES[name](SPACE, SPACE.macs(SPACE.smallest) - 1, sorted_scores(SCORES))

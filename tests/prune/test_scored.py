import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.errors import LimitError
from tdc_ray.models.architectures import architecture
from tdc_ray.prune.importance import Scores, random_scores
from tdc_ray.prune.memory import MemoryEntry
from tdc_ray.prune.scored import global_scheme, propose, uniform_scheme, values_of
from tdc_ray.prune.space import Scheme, Space, is_tight, repair, space_of

SPACE = space_of(architecture("tiny"))
SCORES = random_scores(SPACE.units, seed=0)


def limit_at(space: Space, share: float) -> int:
    return space.min_macs + round(share * (space.macs_base - space.min_macs))


def remembered(schemes: list[Scheme], losses: list[float]) -> list[MemoryEntry]:
    return [
        MemoryEntry(
            group=0,
            round=0,
            candidate=place,
            source="taylor/uniform",
            widths=scheme,
            macs=SPACE.macs(scheme),
            num_params=SPACE.num_params(scheme),
            loss_cut=loss,
        )
        for place, (scheme, loss) in enumerate(zip(schemes, losses, strict=True))
    ]


def ask(
    share: float,
    memory: list[MemoryEntry],
    *,
    num: int = 4,
    seed: int = 0,
    scores: Scores = SCORES,
) -> list[tuple[str, dict[str, int]]]:
    limit = limit_at(SPACE, share)
    return propose(SPACE, scores, limit, memory, num_candidates=num, seed=seed)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 6))
def test_proposals_of_three_rounds_are_tight_and_all_different(seed, share, num):
    scores, limit = random_scores(SPACE.units, seed), limit_at(SPACE, share)
    memory: list[MemoryEntry] = []
    for round_ in range(3):
        found = ask(share, memory, num=num, seed=seed + round_, scores=scores)
        assert len(found) <= num
        assert all(is_tight(SPACE, scheme, limit) for _, scheme in found)
        schemes = [entry.widths for entry in memory] + [scheme for _, scheme in found]
        assert all(scheme not in schemes[:place] for place, scheme in enumerate(schemes))
        draw = random.Random(round_)
        memory = remembered(schemes, [draw.random() for _ in schemes])
    assert memory


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_first_round_begins_with_the_uniform_ratio_and_the_global_ranking(share):
    limit, values = limit_at(SPACE, share), values_of(SCORES)
    found = ask(share, [])
    assert [name for name, _ in found] == ["uniform", "global", "moved", "moved"]
    assert found[0][1] == uniform_scheme(SPACE, limit, values)
    assert found[1][1] == global_scheme(SPACE, limit, values)
    assert ask(share, [], num=1) == found[:1]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_uniform_scheme_is_the_largest_even_share_filled_up_to_the_limit(share):
    limit = limit_at(SPACE, share)
    even = [  # widths are 8 and 2, so a share makes a difference at every eighth
        {unit.name: max(1, unit.width * eighths // 8) for unit in SPACE.units}
        for eighths in range(1, 9)
    ]
    largest = max((scheme for scheme in even if SPACE.macs(scheme) <= limit), key=SPACE.macs)
    scheme = uniform_scheme(SPACE, limit, values_of(SCORES))
    assert all(scheme[name] >= width for name, width in largest.items())
    assert is_tight(SPACE, scheme, limit)


def test_the_global_scheme_cuts_the_least_score_per_mac_wherever_it_is():
    low = SPACE.units[3]
    scores = {unit.name: [1.0] * unit.width for unit in SPACE.units}
    scores[low.name] = [1e-6] * low.width
    limit = SPACE.macs_base - (low.width - 1) * SPACE.step_macs(low.name, SPACE.full)
    expected = {**SPACE.full, low.name: 1}
    assert global_scheme(SPACE, limit, values_of(scores)) == expected


def test_values_fall_along_the_places_of_a_unit():
    assert values_of({"block": [0.1, 0.7, 0.3]}) == {"block": [0.7, 0.3, 0.1]}


def distance(one: Scheme, other: Scheme) -> int:
    return sum(abs(one[name] - other[name]) for name in one)


@pytest.mark.parametrize("better", [0, 1])
def test_later_rounds_move_from_the_best_scheme(better):
    names = [unit.name for unit in SPACE.units]
    values, limit = values_of(SCORES), limit_at(SPACE, 0.5)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    far_apart = [
        repair(SPACE, {**SPACE.full, **dict.fromkeys(half, 1)}, limit, values) for half in halves
    ]
    assert distance(*far_apart) > 20
    memory = remembered(far_apart, [0.1, 0.9] if better == 0 else [0.9, 0.1])
    found = ask(0.5, memory, num=6)
    assert [name for name, _ in found] == ["moved"] * 6
    for _, scheme in found:
        assert distance(scheme, far_apart[better]) < distance(scheme, far_apart[1 - better])


def test_the_same_question_gets_the_same_proposals():
    memory = remembered([scheme for _, scheme in ask(0.5, [])], [0.4, 0.2, 0.3, 0.5])
    for remember in ([], memory):
        assert ask(0.5, remember, seed=7) == ask(0.5, remember, seed=7)
    assert ask(0.5, memory, seed=7) != ask(0.5, memory, seed=8)


def test_the_limit_of_the_base_leaves_nothing_to_propose_but_the_full_scheme():
    found = ask(1.0, [])
    assert found == [("uniform", SPACE.full)]
    assert ask(1.0, remembered([SPACE.full], [0.1])) == []


def test_a_limit_that_no_scheme_meets_is_an_error():
    with pytest.raises(LimitError):
        propose(SPACE, SCORES, SPACE.min_macs - 1, [], num_candidates=2, seed=0)

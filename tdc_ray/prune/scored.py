"""Proposes schemes from scores: uniform ratios, a global ranking, and steps from the best."""

import random
from collections.abc import Sequence

from tdc_ray.prune.importance import Scores
from tdc_ray.prune.memory import MemoryEntry, best
from tdc_ray.prune.space import Scheme, Space, Values, repair
from tdc_ray.seeds import derive_seed

MAX_TRIES = 50
"""Draws for a scheme that was not tried before; in a tiny space there may be none."""


def values_of(scores: Scores) -> Values:
    """Order every unit's scores from the highest down: what its 1st, 2nd, ... place is worth."""
    return {name: sorted(values, reverse=True) for name, values in scores.items()}


def uniform_scheme(space: Space, max_macs: int, values: Values) -> dict[str, int]:
    """Keep the same share of every unit, the largest share within the limit, then fill up."""

    def at(share: float) -> dict[str, int]:
        return {unit.name: max(1, int(share * unit.width)) for unit in space.units}

    low, high = 0.0, 1.0
    for _ in range(20):  # to a millionth of the width
        middle = (low + high) / 2
        if space.macs(at(middle)) <= max_macs:
            low = middle
        else:
            high = middle
    return repair(space, at(low), max_macs, values)


def global_scheme(space: Space, max_macs: int, values: Values) -> dict[str, int]:
    """Rank all units' groups and heads together, by score per mac, and cut the lowest."""
    return repair(space, space.full, max_macs, values)


def propose(
    space: Space,
    scores: Scores,
    max_macs: int,
    memory: Sequence[MemoryEntry],
    *,
    num_candidates: int,
    seed: int,
) -> list[tuple[str, dict[str, int]]]:
    """Propose schemes within a limit, none of which the memory bank holds.

    The first round begins with the uniform ratio and the global ranking. What else is asked for,
    and every later round, takes the best scheme so far and moves some of its widths; the scores
    decide how that is repaired to the limit.

    Args:
        space: The pruning space.
        scores: Scores on the group's timesteps.
        max_macs: The limit.
        memory: What the group has found so far.
        num_candidates: How many schemes.
        seed: Decides what is moved, together with how much is remembered.

    Returns:
        Pairs of a name and a scheme; fewer than asked for where the space holds no more.

    Raises:
        LimitError: No scheme is within the limit.
    """
    values = values_of(scores)
    tried = {_key(entry.widths) for entry in memory}
    found: list[tuple[str, dict[str, int]]] = []

    def take(name: str, scheme: dict[str, int]) -> None:
        if _key(scheme) not in tried and len(found) < num_candidates:
            tried.add(_key(scheme))
            found.append((name, scheme))

    if not memory:
        take("uniform", uniform_scheme(space, max_macs, values))
        take("global", global_scheme(space, max_macs, values))
    start = best(list(memory)).widths if memory else found[0][1]
    draw = random.Random(derive_seed(seed, len(memory)))
    for _ in range(MAX_TRIES * num_candidates):
        if len(found) == num_candidates:
            break
        take("moved", repair(space, _moved(space, start, draw), max_macs, values))
    return found


def _moved(space: Space, scheme: Scheme, draw: random.Random) -> dict[str, int]:
    """Widen or narrow about a third of the units by up to a quarter of their width."""
    moved = dict(scheme)
    for unit in space.units:
        if draw.random() < 1 / 3:
            reach = max(1, unit.width // 4)
            width = moved[unit.name] + draw.choice((-1, 1)) * draw.randint(1, reach)
            moved[unit.name] = min(max(width, 1), unit.width)
    return moved


def _key(scheme: Scheme) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(scheme.items()))

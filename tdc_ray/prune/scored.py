"""The baselines: schemes that follow from scores alone."""

from tdc_ray.prune.importance import Scores
from tdc_ray.prune.space import Space, Values, repair


def values_of(scores: Scores) -> Values:
    """Order every unit's scores from the highest down: what its 1st, 2nd, ... place is worth."""
    return {name: sorted(values, reverse=True) for name, values in scores.items()}


def uniform_scheme(space: Space, max_macs: int, values: Values) -> dict[str, int]:
    """Keep the same share of every unit, the largest share within the limit, then fill up.

    Raises:
        LimitError: No scheme is within the limit.
    """

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
    """Rank all units' steps together by their scores, cut the lowest, then fill up.

    Raises:
        LimitError: No scheme is within the limit.
    """
    space.check_limit(max_macs, "the model")
    scheme = space.full
    ranked = sorted(
        (value, unit.name)
        for unit in space.units
        for value in values[unit.name][1:]  # the best stays
    )
    for _, name in ranked:
        if space.macs(scheme) <= max_macs:
            break
        scheme[name] -= 1
    return repair(space, scheme, max_macs, values)


def per_mac_scheme(space: Space, max_macs: int, values: Values) -> dict[str, int]:
    """Rank all units' steps together by score per mac, and cut the lowest.

    Raises:
        LimitError: No scheme is within the limit.
    """
    return repair(space, space.full, max_macs, values)


BASELINES = {
    "uniform": uniform_scheme,
    "global": global_scheme,
    "global-per-mac": per_mac_scheme,
}
"""By name, in the order in which they are tried."""


def baseline_schemes(
    space: Space, scores: Scores, max_macs: int
) -> list[tuple[str, dict[str, int]]]:
    """Give the different schemes within a limit that follow from scores, with their names.

    Raises:
        LimitError: No scheme is within the limit.
    """
    found: list[tuple[str, dict[str, int]]] = []
    for name, scheme_for in BASELINES.items():
        scheme = scheme_for(space, max_macs, values_of(scores))
        if all(scheme != other for _, other in found):
            found.append((name, scheme))
    return found

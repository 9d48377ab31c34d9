"""The baselines: schemes that follow from scores alone."""

from itertools import pairwise

from tdc_ray.pruning.criteria.scores import Scores
from tdc_ray.pruning.space import Space, Values, fit_to_limit


def sorted_scores(scores: Scores) -> Values:
    """Sort every unit's scores from the highest down: the values of its 1st, 2nd, ... step."""
    return {name: sorted(values, reverse=True) for name, values in scores.items()}


def uniform_scheme(space: Space, limit: int, values: Values) -> dict[str, int]:
    """Keep the same share of every unit, the largest within the limit, then widen what fits.

    Raises:
        LimitError: No scheme is within the limit.
    """

    def scheme_at(share: float) -> dict[str, int]:
        return {  # rounding down removes no branch
            unit.name: max(
                space.floor_width(unit.name, int(share * unit.width)),
                space.next_wider(unit.name, 0),
            )
            for unit in space.units
        }

    low, high = 0.0, 1.0
    for _ in range(20):  # to a millionth of the width
        middle = (low + high) / 2
        if space.cost(scheme_at(middle)) <= limit:
            low = middle
        else:
            high = middle
    return fit_to_limit(space, scheme_at(low), limit, values)


def global_scheme(space: Space, limit: int, values: Values) -> dict[str, int]:
    """Rank all units' steps together by their scores, remove the lowest, then widen what fits.

    Raises:
        LimitError: No scheme is within the limit.
    """
    space.check_limit(limit, "the model")
    scheme = space.full
    ranked = sorted(
        (sum(values[name][start:stop]) / (stop - start), name)
        for name, widths in space.legal.items()
        for start, stop in pairwise(widths)
    )
    for _, name in ranked:
        if space.cost(scheme) <= limit:
            break
        scheme[name] = space.next_narrower(name, scheme[name])
    return fit_to_limit(space, scheme, limit, values)


def per_mac_scheme(space: Space, limit: int, values: Values) -> dict[str, int]:
    """Rank all units' steps together by score per mac, or per time, and remove the lowest.

    Raises:
        LimitError: No scheme is within the limit.
    """
    return fit_to_limit(space, space.full, limit, values)


BASELINES = {
    "uniform": uniform_scheme,
    "global": global_scheme,
    "global-per-mac": per_mac_scheme,
}
"""By name, in the order in which they are used."""


def baseline_schemes(space: Space, scores: Scores, limit: int) -> list[tuple[str, dict[str, int]]]:
    """Return the distinct schemes within a limit that follow from scores, with their names.

    Raises:
        LimitError: No scheme is within the limit.
    """
    schemes: list[tuple[str, dict[str, int]]] = []
    for name, scheme_for in BASELINES.items():
        scheme = scheme_for(space, limit, sorted_scores(scores))
        if all(scheme != other for _, other in schemes):
            schemes.append((name, scheme))
    return schemes

"""The offline proxy: a knapsack over sensitivities that learns from the memory bank.

It predicts that the increase of the loss adds up over the units, each unit's own increase
times a factor of its own. The factors are 1 at first; every measured scheme is a linear equation
for them, and new schemes follow from draws of their posterior (Bayesian linear regression,
Thompson sampling). The best scheme of a draw under a limit is a knapsack problem, which is solved
greedily.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from tdc_ray.execution.chain import Chain
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.knapsack import FactorArray, knapsack, loss_curves, step_worth
from tdc_ray.pruning.memory import MemoryEntry, best
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import Scheme, Space, fit_to_limit
from tdc_ray.seeds import derive_seed

FACTOR_SPREAD = 0.3
"""Prior standard deviation of a unit's factor."""

PREDICTION_ERROR = 0.1
"""Standard deviation of a prediction with the right factors, as a share of the mean increase."""

MAX_TRIES = 50
"""Most draws for a new scheme; in a tiny space there may be none."""


def offline_proxy(
    search: GroupSearch,
    request: ProposalRequest,
    memory: Sequence[MemoryEntry],
    cost: SearchCost,
) -> Chain[list[Scheme]]:
    """Propose schemes on the driver, without an item: it takes milliseconds."""
    del search
    yield from ()
    started = time.perf_counter()
    schemes = propose_offline(request, memory)
    cost.proxy_seconds += time.perf_counter() - started
    return schemes


def propose_offline(request: ProposalRequest, memory: Sequence[MemoryEntry]) -> list[Scheme]:
    """Return schemes within the limit that this group has not tried, best guess first.

    The first is the knapsack with the likeliest factors, the next, where the loss is modelled, the
    best joint scheme of the model; where other groups' schemes are visible, the best of the
    nearest group follows, fitted to this limit; the rest are draws, the same ones for the same
    seed.

    Raises:
        LimitError: No scheme is within the limit.
    """
    space = request.space
    curves = loss_curves(space, request.sensitivities)
    group_entries = [entry for entry in memory if entry.group == request.group]
    tried = [dict(entry.widths) for entry in group_entries]
    schemes: list[Scheme] = []

    def add(scheme: Scheme) -> None:
        if scheme not in tried and scheme not in schemes:
            schemes.append(scheme)

    mean, factor = _posterior(space, curves, group_entries, request.loss_base)
    add(knapsack(space, curves, request.limit, mean))
    if request.model is not None:
        add(JointIncrease(space, request.model).best_scheme(request.limit))
    nearest = _nearest_group(memory, request.group)
    if nearest:
        values = step_worth(space, curves, mean)
        add(fit_to_limit(space, best(nearest).widths, request.limit, values))
    draw = np.random.default_rng(derive_seed(request.seed, "offline", len(group_entries)))
    for number in range(MAX_TRIES * request.num_candidates):
        if len(schemes) >= request.num_candidates:
            break
        spread = 1 + number / MAX_TRIES  # repeated schemes widen the draws
        factors = mean + spread * (factor @ draw.standard_normal(len(mean)))
        add(knapsack(space, curves, request.limit, factors))
    return schemes[: request.num_candidates]


def _posterior(
    space: Space,
    curves: Mapping[str, FactorArray],
    entries: Sequence[MemoryEntry],
    loss_base: float,
) -> tuple[FactorArray, FactorArray]:
    """Return the mean of the units' factors, ``(U,)``, and a root of their covariance."""
    size = len(space.units)
    pieces = np.array(
        [[curves[u.name][e.widths[u.name] - 1] for u in space.units] for e in entries]
    ).reshape(-1, size)  # (entries, U)
    increases = np.array([entry.increase(loss_base) for entry in entries])
    usable = np.isfinite(increases)
    pieces, increases = pieces[usable], increases[usable]
    if not len(increases) or pieces.sum() <= 0 or increases.mean() <= 0:
        return np.ones(size), FACTOR_SPREAD * np.eye(size)
    scale = increases.sum() / pieces.sum()  # units affect each other: all increase alike
    pieces = pieces * scale / (PREDICTION_ERROR * increases.mean())
    target = increases / (PREDICTION_ERROR * increases.mean())
    precision = np.eye(size) / FACTOR_SPREAD**2
    covariance = np.linalg.inv(precision + pieces.T @ pieces)
    mean = covariance @ (precision @ np.ones(size) + pieces.T @ target)
    return mean, np.linalg.cholesky(covariance)


def _nearest_group(memory: Sequence[MemoryEntry], group: int) -> list[MemoryEntry]:
    """Return the entries of the nearest other group; of two, that of the noisier timesteps."""
    others = {entry.group for entry in memory} - {group}
    if not others:
        return []
    nearest = min(others, key=lambda other: (abs(other - group), -other))
    return [entry for entry in memory if entry.group == nearest]

"""The offline proxy: a knapsack over sensitivities that learns from the memory bank.

What cuts cost is predicted by `Predictor`; new schemes follow from draws of its factors' posterior
(Thompson sampling). The best scheme of a draw under a limit is a knapsack problem, which is solved
greedily.
"""

import time
from collections.abc import Sequence

import numpy as np

from tdc_ray.execution.chain import Chain
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.knapsack import knapsack, step_worth
from tdc_ray.pruning.memory import MemoryEntry, best
from tdc_ray.pruning.predictor import Predictor
from tdc_ray.pruning.proxy import Proposal, ProposalRequest, Round
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import Scheme, fit_to_limit
from tdc_ray.seeds import derive_seed

MAX_TRIES = 50
"""Most draws for a new scheme; in a tiny space there may be none."""


def offline_proxy(search: GroupSearch, round_: Round, cost: SearchCost) -> Chain[None]:
    """Propose schemes on the driver, without an item: it takes milliseconds.

    What others had measured in the same round does not change what it proposes: where they
    measured nothing the round is what it would have been without them.
    """
    del search
    started = time.perf_counter()
    schemes = propose_offline(round_.request, round_.memory)
    cost.proxy_seconds += time.perf_counter() - started
    yield from round_.measure([Proposal("offline", scheme) for scheme in schemes])


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
    group_entries = [entry for entry in memory if entry.group == request.group]
    tried = [dict(entry.widths) for entry in group_entries]
    schemes: list[Scheme] = []

    def add(scheme: Scheme) -> None:
        if scheme not in tried and scheme not in schemes:
            schemes.append(scheme)

    predictor = Predictor.of(request, group_entries)
    curves, mean, root = predictor.curves, predictor.factors, predictor.root
    add(knapsack(space, curves, request.limit, mean))
    if request.model is not None:
        joint = JointIncrease(space, request.model).best_scheme(request.limit)
        add(fit_to_limit(space, joint, request.limit, step_worth(space, curves)))
    nearest = _nearest_group(memory, request.group)
    if nearest:
        values = step_worth(space, curves, mean)
        add(fit_to_limit(space, best(nearest).widths, request.limit, values))
    draw = np.random.default_rng(derive_seed(request.seed, "offline", len(group_entries)))
    for number in range(MAX_TRIES * request.num_candidates):
        if len(schemes) >= request.num_candidates:
            break
        spread = 1 + number / MAX_TRIES  # repeated schemes widen the draws
        factors = mean + spread * (root @ draw.standard_normal(len(mean)))
        add(knapsack(space, curves, request.limit, factors))
    return schemes[: request.num_candidates]


def _nearest_group(memory: Sequence[MemoryEntry], group: int) -> list[MemoryEntry]:
    """Return the entries of the nearest other group; of two, that of the noisier timesteps."""
    others = {entry.group for entry in memory} - {group}
    if not others:
        return []
    nearest = min(others, key=lambda other: (abs(other - group), -other))
    return [entry for entry in memory if entry.group == nearest]

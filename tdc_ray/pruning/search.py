"""The search for a group's sub-model: propose, fit to the limit, cut, refit, measure, remember."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

from tdc_ray.config.prune import ProxyMethod, ScoreMethod
from tdc_ray.execution.chain import Barrier, Chain
from tdc_ray.execution.item import Result
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.criteria.scores import Scores, select_top
from tdc_ray.pruning.group import Candidate, GroupSearch, SearchCost, SearchResult
from tdc_ray.pruning.jobs import ScoreJob, score_inputs
from tdc_ray.pruning.knapsack import extend_sensitivities, knapsack, loss_curves, step_worth
from tdc_ray.pruning.loaded_base import score_units
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.pruning.proxies.by_score import baseline_schemes
from tdc_ray.pruning.proxies.registry import PROXIES
from tdc_ray.pruning.proxy import ProposalRequest, Sensitivities
from tdc_ray.pruning.space import Scheme, fit_to_limit
from tdc_ray.pruning.tasks.candidates import (
    SENSITIVITY_ITEMS,
    base_item,
    measure_item,
    sensitivity_items,
)
from tdc_ray.seeds import derive_seed


def search(task: GroupSearch, memory: MemoryBank) -> Chain[SearchResult]:
    """Find the sub-model of a group, as a chain of work items.

    Without pruning (``prune.method`` none) it is the base itself.
    """
    task.check_space()
    config, spent = task.config, SearchCost()
    full = keep_everything(task.space.units)
    (base,) = yield [base_item(task)]
    spent.add(base)
    loss_base = base["loss_cut"]
    method = config.prune.method
    if method == "none" or task.limit >= task.space.cost_base:
        return SearchResult(full, None, loss_base, (), spent)
    if method == "offline" or method == "llm":
        found = yield from _search_by_proxy(task, memory, method, loss_base, spent)
    else:
        found = yield from _search_by_score(task, memory, method, spent)
    found.sort(key=lambda tried: (isnan(tried.entry.loss), tried.entry.loss, tried.entry.place))
    return SearchResult(found[0].kept, found[0].entry, loss_base, tuple(found), spent)


def _search_by_score(
    task: GroupSearch, memory: MemoryBank, method: ScoreMethod, spent: SearchCost
) -> Chain[list[Candidate]]:
    """Measure the schemes that follow from a score; there is one round and nothing to learn."""
    scores = yield from _scores(task, method, spent)
    found = baseline_schemes(task.space, scores, task.limit)
    schemes = [_Proposal(f"{method}/{name}", scheme) for name, scheme in found]
    return (yield from _measure(task, memory, 0, schemes, scores, spent))


def _search_by_proxy(
    task: GroupSearch,
    memory: MemoryBank,
    method: ProxyMethod,
    loss_base: float,
    spent: SearchCost,
) -> Chain[list[Candidate]]:
    """Measure sensitivities, then let the proxy propose, round by round."""
    config, group = task.config, task.group
    scores, sensitivities = yield from _sensitivities(task, loss_base, spent)
    shared = config.prune.memory == "shared" and len(task.participants) > 1
    candidates: list[Candidate] = []
    for number in range(config.prune.num_rounds):
        if shared and number > 0:
            yield Barrier(f"round {number}", task.participants)
        seen = memory.seen_by(group.index, before_round=number, shared=shared)
        request = ProposalRequest(
            space=task.space,
            group=group.index,
            timesteps=(group.first, group.last),
            snr_db=(group.snr_db_first, group.snr_db_last),
            limit=task.limit,
            loss_base=loss_base,
            scores=scores,
            sensitivities=sensitivities,
            num_candidates=config.prune.num_candidates,
            round=number,
            num_rounds=config.prune.num_rounds,
            seed=derive_seed(config.seed, "propose", group.index, number),
        )
        proposals = _Proposals(request, seen)
        names: tuple[ProxyMethod, ...] = (method, "offline")  # which fills up what others lack
        for name in dict.fromkeys(names):
            if len(proposals.found) < config.prune.num_candidates:
                schemes = yield from PROXIES[name](task, request, seen, spent)
                proposals.add(name, schemes)
        candidates += yield from _measure(task, memory, number, proposals.found, scores, spent)
    return candidates


def _scores(task: GroupSearch, method: ScoreMethod, spent: SearchCost) -> Chain[Scores]:
    """Score the base's units."""
    job = ScoreJob(task.run_dir, task.config, task.group, method)
    cost = 3.0 * task.config.prune.num_images * task.space.macs_base
    (scored,) = yield [task.item("scores", score_units, job, cost=cost, inputs=score_inputs)]
    spent.add(scored)
    scores: Scores = scored["scores"]
    return scores


def _sensitivities(
    task: GroupSearch, loss_base: float, spent: SearchCost
) -> Chain[tuple[Scores, Sensitivities]]:
    """Measure sensitivities on the base, then on knapsacks of these on the way to the limit."""
    prune, space = task.config.prune, task.space
    has_streams = any(unit.kind == "stream" for unit in space.units)
    scores: Scores = {}
    if prune.refit == "none" or has_streams:
        scores = yield from _scores(task, "taylor", spent)
        ranked = [
            unit.name for unit in space.units if prune.refit == "none" or unit.kind == "stream"
        ]
        scores = {name: scores[name] for name in ranked}
    full = keep_everything(space.units)
    items = sensitivity_items(task, 0, full, scores, loss_base, SENSITIVITY_ITEMS)
    sensitivities: Sensitivities = {}
    for part in (yield items):
        spent.add(part)
        scores |= part.get("scores", {})
        sensitivities = {**sensitivities, **_by_width(part)}
    scores = {unit.name: [0.0] for unit in space.units if unit.width == 1} | scores
    for number in range(1, prune.num_passes):
        too_much = space.cost_base - task.limit
        limit = space.cost_base - too_much * number // (prune.num_passes - 1)
        curves = loss_curves(space, sensitivities)
        start = knapsack(space, curves, limit)
        kept, loss = select_top(space.units, scores, start), loss_base
        if has_streams:
            (measured,) = yield [measure_item(task, f"sensitivities-{number}-start", kept, 0)]
            spent.add(measured)
            loss = _loss(measured)
        grown: dict[str, dict[int, float]] = {}
        for part in (yield sensitivity_items(task, number, kept, scores, loss, 1)):
            spent.add(part)
            grown |= _by_width(part)
        sensitivities = extend_sensitivities(sensitivities, curves, start, grown)
    return scores, sensitivities


def _loss(measured: Result) -> float:
    """What a candidate is judged by."""
    loss: float = (
        measured["loss_cut"] if measured["loss_refit"] is None else measured["loss_refit"]
    )
    return loss


def _by_width(result: Result) -> dict[str, dict[int, float]]:
    """Give the sensitivities of an item, whose widths are text where they were read from JSON."""
    found = result["sensitivities"].items()
    return {unit: {int(width): loss for width, loss in grown.items()} for unit, grown in found}


@dataclass(frozen=True, slots=True)
class _Proposal:
    source: str
    scheme: Scheme
    overshoot: int = 0


class _Proposals:
    """Collects proposals of a round: brought to the limit, no more than asked for, none twice."""

    def __init__(self, task: ProposalRequest, seen: Sequence[MemoryEntry]) -> None:
        self._task = task
        self._tried = [dict(entry.widths) for entry in seen if entry.group == task.group]
        self.found: list[_Proposal] = []

    def add(self, source: str, schemes: Sequence[Scheme]) -> None:
        task = self._task
        values = step_worth(task.space, loss_curves(task.space, task.sensitivities))
        for scheme in schemes:
            fitted = fit_to_limit(task.space, scheme, task.limit, values)
            if fitted not in self._tried and len(self.found) < task.num_candidates:
                overshoot = max(0, task.space.cost(scheme) - task.limit)
                self.found.append(_Proposal(source, fitted, overshoot))
                self._tried.append(fitted)


def _measure(
    task: GroupSearch,
    memory: MemoryBank,
    number: int,
    proposals: Sequence[_Proposal],
    scores: Scores,
    spent: SearchCost,
) -> Chain[list[Candidate]]:
    """Cut, refit and measure the schemes of a round, and remember them."""
    space, prune = task.space, task.config.prune
    kept = [select_top(space.units, scores, dict(proposal.scheme)) for proposal in proposals]
    first = 1 + number * prune.num_candidates
    results = yield [
        measure_item(task, f"round-{number}-candidate-{place}", choice, first + place)
        for place, choice in enumerate(kept)
    ]
    found = []
    for place, (proposal, result) in enumerate(zip(proposals, results, strict=True)):
        entry = MemoryEntry(
            group=task.group.index,
            round=number,
            candidate=place,
            source=proposal.source,
            widths=proposal.scheme,
            macs=space.macs(proposal.scheme),
            num_params=space.num_params(proposal.scheme),
            loss_cut=result["loss_cut"],
            loss_refit=result["loss_refit"],
            overshoot=proposal.overshoot,
            nanoseconds=space.nanoseconds(proposal.scheme),
        )
        memory.add(entry)
        spent.add(result)
        found.append(Candidate(entry, kept[place]))
    return found

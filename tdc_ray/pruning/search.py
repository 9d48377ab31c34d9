"""A group's search for its sub-model: propose, fit, prune, refit, measure, remember."""

from collections.abc import Mapping, Sequence

from tdc_ray.config.prune import ProxyMethod, ScoreMethod
from tdc_ray.execution.chain import Barrier, Chain, result_of, results_of
from tdc_ray.models.units import KeptIndices, keep_everything
from tdc_ray.pruning.criteria.scores import Scores, select_top
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.knapsack import extend_sensitivities, knapsack, loss_curves
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.pruning.predictor import Predictor
from tdc_ray.pruning.proxies.by_score import (
    baseline_schemes,
    global_scheme,
    sorted_scores,
    uniform_scheme,
)
from tdc_ray.pruning.proxies.registry import PROXIES
from tdc_ray.pruning.proxy import Proposal, ProposalRequest, Proxy, Sensitivities
from tdc_ray.pruning.quadratic_model import QuadraticModel
from tdc_ray.pruning.race import first_heat, race
from tdc_ray.pruning.result import Candidate, SearchCost, SearchResult
from tdc_ray.pruning.tasks.candidates import WHOLE, Heat, base_item, candidate_item
from tdc_ray.pruning.tasks.scores import score_item
from tdc_ray.pruning.tasks.second_order import second_order_item
from tdc_ray.pruning.tasks.sensitivities import (
    NUM_SHARES,
    SensitivityResult,
    StreamResult,
    sensitivity_items,
)
from tdc_ray.seeds import derive_seed


def search_submodel(
    search: GroupSearch, memory: MemoryBank, proxies: Mapping[ProxyMethod, Proxy] = PROXIES
) -> Chain[SearchResult]:
    """Find the sub-model of a group, as a chain of work items.

    Without pruning (``prune.method`` none) it is the base itself.

    Args:
        search: The group's search.
        memory: The memory bank of the run.
        proxies: What proposes, by the names of ``prune.method``.
    """
    search.check_space()
    rounds, method = _Rounds(search, memory), search.context.prune.method
    base = yield from result_of(base_item(search))
    rounds.cost.add(base.macs, base.seconds)
    if search.context.models_all_groups:  # its limit follows from the model, whatever is proposed
        modelled = yield from result_of(second_order_item(search))
        rounds.cost.add(modelled.macs, modelled.seconds)
    if method == "none" or search.limit >= search.space.cost_base:
        kept = keep_everything(search.space.units)
        return SearchResult(kept, None, base.loss_cut, (), rounds.cost)
    if method == "offline" or method == "llm":
        candidates = yield from rounds.by_proxy(method, proxies)
    else:
        candidates = yield from rounds.by_score(method)
    candidates = yield from race(search, memory, rounds.cost, candidates)
    best = candidates[0]
    return SearchResult(best.kept, best.entry, base.loss_cut, tuple(candidates), rounds.cost)


Predictions = tuple[Scores, Sensitivities, QuadraticModel | None, Mapping[str, int]]
"""The order in which the steps of units go, and what the increase of the loss is predicted by; the
last is `ProposalRequest.pruned_elsewhere`."""


class _Rounds:
    """The rounds of one search."""

    def __init__(self, search: GroupSearch, memory: MemoryBank) -> None:
        self._search, self._memory, self.cost = search, memory, SearchCost()
        self._space, self._prune = search.space, search.context.prune

    def by_score(self, method: ScoreMethod) -> Chain[list[Candidate]]:
        """Measure the schemes that follow from a score, in one round."""
        scores = yield from self._scores(method)
        schemes = baseline_schemes(self._space, scores, self._search.limit)
        proposals = [Proposal(f"{method}/{name}", scheme) for name, scheme in schemes]
        choices, heat = self.kept(proposals, scores), first_heat(len(proposals))
        return (yield from self.measure(0, proposals, choices, heat))

    def by_proxy(
        self, method: ProxyMethod, proxies: Mapping[ProxyMethod, Proxy]
    ) -> Chain[list[Candidate]]:
        """Learn what cuts cost, then let the proxy propose, round by round."""
        search, prune, group = self._search, self._prune, self._search.group
        heat = first_heat(prune.num_rounds * prune.num_candidates + len(prune.rivals))
        loss_base = yield from self._loss_of("base", keep_everything(self._space.units), heat)
        scores, sensitivities, model, pruned_elsewhere = yield from (
            self._modelled() if prune.models_loss and self._space.has_steps else self._measured()
        )
        shared = prune.memory == "shared" and len(search.participants) > 1
        candidates: list[Candidate] = []
        for number in range(prune.num_rounds):
            if shared and number > 0:
                yield Barrier(f"round {number}", search.participants)
            visible = self._memory.visible_to(group.index, before_round=number, shared=shared)
            request = ProposalRequest(
                space=self._space,
                group=group.index,
                timesteps=(group.first, group.last),
                snr_db=(group.snr_db_first, group.snr_db_last),
                limit=search.limit,
                loss_base=loss_base,
                scores=scores,
                sensitivities=sensitivities,
                num_candidates=prune.num_candidates,
                round=number,
                num_rounds=prune.num_rounds,
                seed=derive_seed(search.context.seed, "propose", group.index, number),
                model=model,
                pruned_elsewhere=pruned_elsewhere,
                num_images=prune.num_images,
                num_refit_images=prune.num_refit_images if prune.refit != "none" else 0,
                images_share=heat.share,
            )
            # The offline proxy does what it would alone: a language model's schemes come on top.
            alone = [entry for entry in visible if not entry.is_by_llm]
            own = _Round(self, request, alone, scores, heat)
            yield from proxies["offline"](search, own, self.cost)
            candidates += own.candidates
            if method != "offline":
                seen = [*visible, *own.measured]
                beside = _Round(self, request, seen, scores, heat, start=prune.num_candidates)
                yield from proxies[method](search, beside, self.cost)
                candidates += beside.candidates
        candidates += yield from self._rivals(heat, scores)
        return candidates

    def _rivals(self, heat: Heat, own: Scores) -> Chain[list[Candidate]]:
        """Measure each rival's scheme; uniform has no ranking of channels but the search's own."""
        proposals: list[Proposal] = []
        choices: list[KeptIndices] = []
        for rival in self._prune.rivals:
            if rival == "uniform":
                scores, scheme_for, source = own, uniform_scheme, "uniform"
            else:
                scores = yield from self._scores(rival, f"scores-{rival}")
                scheme_for, source = global_scheme, f"{rival}/global"
            scheme = scheme_for(self._space, self._search.limit, sorted_scores(scores))
            proposals.append(Proposal(source, scheme))
            choices += self.kept(proposals[-1:], scores)
        return (yield from self.measure(self._prune.num_rounds, proposals, choices, heat))

    def kept(self, proposals: Sequence[Proposal], scores: Scores) -> list[KeptIndices]:
        """Return what each scheme keeps: the highest scores."""
        return [select_top(self._space.units, scores, one.scheme) for one in proposals]

    def _scores(self, method: ScoreMethod, name: str = "scores") -> Chain[Scores]:
        """Score the base's units, in an item of some name."""
        result = yield from result_of(score_item(self._search, method, name))
        self.cost.add(result.macs, result.seconds)
        return result.scores

    def _modelled(self) -> Chain[Predictions]:
        """Predict sensitivities by a quadratic model of the loss."""
        result = yield from result_of(second_order_item(self._search))
        if not self._search.context.models_all_groups:
            self.cost.add(result.macs, result.seconds)
        increase = JointIncrease(self._space, result.model)
        return self._with_single(result.scores), increase.sensitivities(), result.model, {}

    def _measured(self) -> Chain[Predictions]:
        """Measure sensitivities on the base, then on knapsacks of these towards the limit."""
        search, prune, space = self._search, self._prune, self._space
        has_others = not space.has_steps
        scores: Scores = {}
        if prune.refit == "none" or has_others:
            by_taylor = yield from self._scores("taylor")
            scores = {
                unit.name: by_taylor[unit.name]
                for unit in space.units
                if prune.refit == "none" or not unit.has_step
            }
        kept: KeptIndices = keep_everything(space.units)
        loss = 0.0  # which units without a step of their own alone are compared with
        if has_others:
            loss = yield from self._loss_of("sensitivities-0-start", kept, WHOLE)
        items = sensitivity_items(search, 0, kept, scores, loss, NUM_SHARES)
        sensitivities: Sensitivities = {}
        results: Sequence[SensitivityResult | StreamResult] = yield items
        for result in results:
            self.cost.add(result.macs, result.seconds)
            if isinstance(result, SensitivityResult):
                scores |= result.scores
            sensitivities = {**sensitivities, **result.sensitivities}
        scores = self._with_single(scores)
        pruned_elsewhere: dict[str, int] = {}
        for number in range(1, prune.num_passes):
            excess = space.cost_base - search.limit
            limit = space.cost_base - excess * number // (prune.num_passes - 1)
            curves = loss_curves(space, sensitivities)
            start = knapsack(space, curves, limit)
            kept = select_top(space.units, scores, start)
            if has_others:
                name = f"sensitivities-{number}-start"
                loss = yield from self._loss_of(name, kept, WHOLE)
            further: dict[str, dict[int, float]] = {}
            results = yield sensitivity_items(search, number, kept, scores, loss, 1)
            for result in results:
                self.cost.add(result.macs, result.seconds)
                further |= result.sensitivities
            sensitivities = extend_sensitivities(sensitivities, curves, start, further)
            for name, below in further.items():
                widest = max(below, default=0)
                pruned_elsewhere[name] = max(widest, pruned_elsewhere.get(name, 0))
        return scores, sensitivities, None, pruned_elsewhere

    def _with_single(self, scores: Scores) -> Scores:
        """Add scores of units of a single step, which are not ranked."""
        return {unit.name: [0.0] for unit in self._space.units if unit.width == 1} | scores

    def _loss_of(self, name: str, kept: KeptIndices, heat: Heat) -> Chain[float]:
        """Measure a model that is no candidate."""
        item = candidate_item(self._search, name, kept, 0, heat)
        result = yield from result_of(item)
        self.cost.add(result.macs, result.seconds)
        return result.loss

    def measure(
        self,
        number: int,
        proposals: Sequence[Proposal],
        choices: Sequence[KeptIndices],
        heat: Heat,
        predictor: Predictor | None = None,
        start: int = 0,
    ) -> Chain[list[Candidate]]:
        """Prune, refit and measure schemes of a round, and remember them.

        Args:
            number: The round.
            proposals: The schemes.
            choices: What each keeps of the units.
            heat: What they are measured on.
            predictor: What would have been predicted of them; None means nothing.
            start: Place of the first among the schemes of the round.
        """
        search, space, first = self._search, self._space, 1 + number * self._prune.max_per_round
        items = [
            candidate_item(search, f"round-{number}-candidate-{index}", kept, first + index, heat)
            for index, kept in enumerate(choices, start)
        ]
        results = yield from results_of(items)
        candidates = []
        for index, (proposal, result) in enumerate(zip(proposals, results, strict=True), start):
            entry = MemoryEntry(
                group=search.group.index,
                round=number,
                candidate=index,
                source=proposal.source,
                widths=proposal.scheme,
                macs=space.macs(proposal.scheme),
                num_params=space.num_params(proposal.scheme),
                loss_cut=result.loss_cut,
                loss_refit=result.loss_refit,
                nanoseconds=space.nanoseconds(proposal.scheme),
                num_images=result.num_images,
                noise=heat.purpose,
                standard_error=result.standard_error,
                loss_base=result.loss_base,
                distance=result.distance,
                distance_error=result.distance_error,
                predicted=None if predictor is None else predictor.increase(proposal.scheme),
                hypothesis=proposal.hypothesis,
            )
            self._memory.add(entry)
            self.cost.add(result.macs, result.seconds)
            candidates.append(Candidate(entry, choices[index - start]))
        return candidates


class _Round:
    """One round of one proxy: a `Round`."""

    def __init__(
        self,
        rounds: _Rounds,
        request: ProposalRequest,
        memory: Sequence[MemoryEntry],
        scores: Scores,
        heat: Heat,
        *,
        start: int = 0,
    ) -> None:
        self.request, self.memory = request, memory
        self.candidates: list[Candidate] = []
        self._rounds, self._scores, self._heat, self._start = rounds, scores, heat, start

    @property
    def measured(self) -> list[MemoryEntry]:
        """Entries of the proxy in this round so far."""
        return [candidate.entry for candidate in self.candidates]

    @property
    def left(self) -> int:
        """How many more schemes may be measured."""
        return self.request.num_candidates - len(self.candidates)

    def measure(self, proposals: Sequence[Proposal]) -> Chain[list[MemoryEntry]]:
        """Measure the first schemes that the group has not tried."""
        request, known = self.request, [*self.memory, *self.measured]
        tried = [dict(entry.widths) for entry in known if entry.group == request.group]
        predictor = Predictor.of(request, self.memory)
        fresh: list[Proposal] = []
        for proposal in proposals:
            assert request.space.cost(proposal.scheme) <= request.limit
            if proposal.scheme not in tried:
                tried.append(dict(proposal.scheme))
                fresh.append(proposal)
        fresh, start = fresh[: self.left], self._start + len(self.candidates)
        choices = self._rounds.kept(fresh, self._scores)
        candidates = yield from self._rounds.measure(
            request.round, fresh, choices, self._heat, predictor, start
        )
        self.candidates += candidates
        return [candidate.entry for candidate in candidates]

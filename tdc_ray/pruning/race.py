"""The race of a group's candidates: all on few images, the better half on more.

All of a heat are measured on the same images and noise; the finalists on held-out images and noise
that no earlier choice has seen, which decides, and results report their losses there.

After a refit, which aims at the base's prediction, candidates rank by how far theirs is from it.
On the digits base the loss increased by about three times that mean square for each of three
schemes, and was known to within a tenth of the precision. Without a refit they rank by the loss.

A language model's candidates race by themselves, and its finalists meet the others': these are
the same as without it, so what is chosen is never behind what would have been without it.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isnan

from tdc_ray.execution.chain import Chain, results_of
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.memory import FinalLosses, MemoryBank
from tdc_ray.pruning.result import Candidate, SearchCost
from tdc_ray.pruning.tasks.candidates import (
    FINAL,
    FIRST,
    SECOND,
    CandidateResult,
    Heat,
    candidate_item,
)

NUM_FINALISTS = 2
"""Candidates that the last heat decides between, and as many of a language model's."""


def first_heat(num_candidates: int) -> Heat:
    """Return the heat of all candidates: the final one where there are no more than finalists."""
    return FIRST if num_candidates > NUM_FINALISTS else FINAL


def race(
    search: GroupSearch, memory: MemoryBank, cost: SearchCost, candidates: Sequence[Candidate]
) -> Chain[list[Candidate]]:
    """Let candidates race that were measured in the first heat, and remember the finalists.

    Args:
        search: The group's search.
        memory: It has the candidates' entries.
        cost: Of the search; what the heats take is added.
        candidates: At least one.

    Returns:
        All of them, the finalists first, best first.
    """
    ranked = sorted(candidates, key=lambda one: _order(one.entry.rank, one))
    if ranked[0].entry.noise == FINAL.purpose:
        return ranked
    sides = []
    for by_llm in (False, True):
        side = [one for one in ranked if one.entry.is_by_llm == by_llm]
        sides.append(side[: max(NUM_FINALISTS, (len(side) + 1) // 2)])
    undecided = [side for side in sides if len(side) > NUM_FINALISTS]
    if undecided:
        results = yield from _measured(search, cost, [c for s in undecided for c in s], SECOND)
        for side in undecided:
            side.sort(key=lambda one: _order(results[one.entry.key].rank, one))
    better = [one for side in sides for one in side[:NUM_FINALISTS]]
    others = [one for one in ranked if one not in better]
    results = yield from _measured(search, cost, better, FINAL)
    better.sort(key=lambda one: _order(results[one.entry.key].rank, one))
    finalists = []
    for one in better:
        result = results[one.entry.key]
        final = FinalLosses(
            loss_cut=result.loss_cut,
            loss_refit=result.loss_refit,
            num_images=result.num_images,
            standard_error=result.standard_error,
            distance=result.distance,
        )
        entry = memory.set_final(one.entry.key, final)
        # What a later fine-tune came to is in the memory bank already when a search is resumed.
        finalists.append(Candidate(replace(entry, loss_tuned=None), one.kept))
    return finalists + others


def _measured(
    search: GroupSearch, cost: SearchCost, candidates: Sequence[Candidate], heat: Heat
) -> Chain[dict[tuple[int, int, int], CandidateResult]]:
    """Measure candidates in a heat; return what came out by their entries' keys."""
    keys = [one.entry.key for one in candidates]
    names = [f"round-{number}-candidate-{index}" for _, number, index in keys]
    last = search.context.prune.max_candidates
    items = [
        candidate_item(search, name, one.kept, last + place, heat)
        for place, (name, one) in enumerate(zip(names, candidates, strict=True), start=1)
    ]
    results = yield from results_of(items)
    for result in results:
        cost.add(result.macs, result.seconds)
    return dict(zip(keys, results, strict=True))


def _order(rank: float, candidate: Candidate) -> tuple[bool, float, bool, tuple[int, int, int]]:
    """Return what candidates are sorted by; what is no number counts as the highest.

    Of equals a language model's come last: to be chosen they have to be better.
    """
    entry = candidate.entry
    return isnan(rank), 0.0 if isnan(rank) else rank, entry.is_by_llm, entry.key

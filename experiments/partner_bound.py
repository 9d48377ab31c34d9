"""How much could any partner of the search gain over the offline proxy?

    python experiments/partner_bound.py --preset digits
    python experiments/partner_bound.py --smoke

The base is pruned to 0.7 F on all timesteps by partners that answer as a language model does, with
changes of the knapsack's scheme, and have as many schemes measured as the offline proxy has. They
follow a script: `random` pins units a step beside the knapsack's, `greedy` exchanges the steps
that the table of predicted costs would exchange next, and the `oracle` knows the true loss of
every scheme: it adds the pin that lowers it most. It chooses and is judged on the very same
images, so that what it gains bounds what a model that changes one unit after the other could. The
others are judged on images and noise that they have not seen.

Hardware and hours: `digits` about half an hour a seed on 2 CPU cores, nearly all of it the oracle.

The paper has no such table.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import numpy as np
from common import Flags, base_of, commits_of, parse_flags
from output import mean_and_spread, write_record, write_table
from stages import all_timesteps

from tdc_ray.config.prune import ProxyMethod
from tdc_ray.execution.chain import Chain, run_chain
from tdc_ray.models.units import KeptIndices
from tdc_ray.pruning.changes import Bound, Change, Planner
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import Measured, load_base, measure
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.proxies.language_model import measure_first_guesses
from tdc_ray.pruning.proxies.offline import offline_proxy
from tdc_ray.pruning.proxy import Proposal, Proxy, Round
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.search import search_submodel

MACS_SHARE = 0.7
MAX_TRIES = 50
"""Changes that a partner suggests in a round, at most."""

Truth = Callable[[KeptIndices], Measured]
Partner = Callable[[GroupSearch, Round, Planner, np.random.Generator], Change]
"""Suggests changes for one measurement."""


def randomly(_: GroupSearch, round_: Round, planner: Planner, draw: np.random.Generator) -> Change:
    """Pin one to three units a step beside the knapsack's width."""
    space, bounds = round_.request.space, []
    for number in draw.choice(len(space.units), min(3, len(space.units)), replace=False):
        name = space.units[number].name
        step = space.next_wider if draw.random() < 0.5 else space.next_narrower
        width = step(name, planner.start.scheme[name])
        bounds.append(Bound(unit=int(number), least=width, most=width))
    return Change(bounds=bounds[: int(draw.integers(1, 4))])


def greedily(_: GroupSearch, round_: Round, planner: Planner, draw: np.random.Generator) -> Change:
    """Exchange the step that costs least by the table against the one that gains most, nearly."""
    space, scheme = round_.request.space, planner.start.scheme
    down, up = [], []
    for number, unit in enumerate(space.units):
        width = scheme[unit.name]
        narrower, wider = (f(unit.name, width) for f in (space.next_narrower, space.next_wider))
        noise = 1 + 0.2 * draw.standard_normal()  # so that it suggests another one next
        if narrower < width:
            cost = space.costs.marginal_cost(unit.name, narrower, width, scheme)
            change = planner.predictor.change(number, width, narrower)[0]
            down.append((noise * change / cost, number, narrower))
        if wider > width:
            cost = space.costs.marginal_cost(unit.name, width, wider, scheme)
            change = planner.predictor.change(number, width, wider)[0]
            up.append((noise * change / cost, number, wider))
    (_, giving, least), (_, taking, most) = min(down), min(up)
    return Change(
        bounds=[Bound(unit=giving, least=1, most=least), Bound(unit=taking, least=most, most=999)]
    )


def all_knowing(truth: Truth) -> Partner:
    """Return the partner that adds the pin by which the true loss falls most."""
    pins: list[Bound] = []

    def suggest(
        _search: GroupSearch, round_: Round, planner: Planner, draw: np.random.Generator
    ) -> Change:
        del draw
        space, scores = round_.request.space, round_.request.scores
        scores = {name: list(values) for name, values in scores.items()}

        def rank(bounds: list[Bound]) -> float:
            scheme = planner.plan(Change(bounds=bounds)).scheme
            return truth(select_top(space.units, scores, scheme)).rank

        current = planner.plan(Change(bounds=pins)).scheme
        options = [pins]
        for number, unit in enumerate(space.units):
            for step in (space.next_narrower, space.next_wider):
                width = step(unit.name, current[unit.name])
                if width != current[unit.name]:
                    others = [bound for bound in pins if bound.unit != number]
                    options.append([*others, Bound(unit=number, least=width, most=width)])
        pins[:] = min(options, key=rank)
        return Change(bounds=list(pins))

    return suggest


def scripted(partner: Partner, seed: int) -> Proxy:
    """Return the proxy that answers as a language model would, by a script."""
    draw = np.random.default_rng(seed)

    def proxy(search: GroupSearch, round_: Round, cost: SearchCost) -> Chain[None]:
        del cost
        yield from measure_first_guesses(round_)
        for _ in range(MAX_TRIES):
            if not round_.left:
                return
            planner = Planner(round_.request, [*round_.memory, *round_.measured])
            planned = planner.plan(partner(search, round_, planner, draw))
            if planner.is_worth_measuring(planned):
                measured = yield from round_.measure([Proposal("llm", planned.scheme)])
                if not measured and partner not in (randomly, greedily):
                    return  # nothing that it knows of is better

    return proxy


def truth_of(search: GroupSearch) -> Truth:
    """Return what measures a sub-model on images and noise that no search sees."""
    base = load_base(search.context, search.group)
    found: dict[str, Measured] = {}

    def measured(kept: KeptIndices) -> Measured:
        key = str(sorted(kept.items()))
        if key not in found:
            found[key] = measure(base, kept, "judge")
        return found[key]

    return measured


def main(flags: Flags) -> None:
    """Search by every partner, judge, and write the table."""
    folder = flags.storage / f"partner_bound-{flags.variant}"
    excess: dict[str, list[float]] = {}
    distances: dict[str, list[float]] = {}
    counts: dict[str, list[int]] = {}
    for seed in flags.seeds:
        base, partners = base_of(flags, seed), {"random": randomly, "greedy": greedily}
        truth: Truth | None = None
        for name in ("offline", "random", "greedy", "oracle"):
            config = flags.config(seed)
            method: ProxyMethod = "offline" if truth is None else "llm"
            config = replace(config, prune=replace(config.prune, method=method))
            task = all_timesteps(config, base, folder / f"seed-{seed}" / name, MACS_SHARE)
            proxies: dict[ProxyMethod, Proxy] = {"offline": offline_proxy}
            if truth is not None:
                proxies["llm"] = scripted(partners.get(name) or all_knowing(truth), seed)
            memory = MemoryBank(task.context.run_dir.memory)
            result = run_chain(search_submodel(task, memory, proxies))
            truth = truth or truth_of(task)  # the offline search has written what it reads
            judged = truth(result.kept)
            assert judged.loss_base is not None
            assert judged.distance is not None
            excess.setdefault(name, []).append(judged.loss - judged.loss_base)
            distances.setdefault(name, []).append(judged.distance)
            counts.setdefault(name, []).append(len(result.candidates))
    reference = mean(distances["offline"])
    rows = [
        [
            name,
            f"{mean(counts[name]):.3g}",
            mean_and_spread(excess[name], digits=6),
            mean_and_spread(distances[name], digits=6),
            f"{100 * (mean(distances[name]) / reference - 1):+.1f} %",
        ]
        for name in excess
    ]
    columns = ["partner", "measured", "loss above the base's", "distance", "against offline"]
    bound = 100 * (1 - mean(distances["oracle"]) / reference)
    note = (
        f"The bound: with true losses in hand the distance from the base's prediction, by which "
        f"schemes are ranked, is {bound:.1f} % lower than the offline proxy's at as many "
        "measurements."
    )
    write_table(folder, "partner_bound", columns, rows, note)
    record = {"excess_loss": excess, "distance": distances, "measured": counts}
    write_record(
        folder, "partner_bound", flags, commits_of(folder), record | {"bound_percent": bound}
    )


if __name__ == "__main__":
    main(parse_flags(__doc__, Flags))

"""How much could any partner of the search gain over the offline proxy?

    python experiments/partner_bound.py --preset digits --schedule None
    python experiments/partner_bound.py --partners "language model" --llm.model NAME
    python experiments/partner_bound.py --smoke

A base is pruned to 0.7 F by partners that answer as a language model does, with changes of the
knapsack's scheme, and have as many schemes measured as the offline proxy has, beside its own. So
what they gain is held against the offline proxy alone, behind which no search by a partner may
end, and against "offline, twice the measurements": the offline proxy in the partner's place, which
sees what a partner sees and has as many measurements and as many finalists. They follow a script:

- `random` pins units a step beside the knapsack's.
- `greedy` exchanges the steps that the table of predicted costs would exchange next.
- `nonsense` says anything: bounds, factors and moves of units and blocks, some of which there are.
- `oracle` knows for free how far every scheme's prediction is from the base's on the images that
  finalists are chosen by, with noise of its own.
- `oracle of the judge` knows for free every scheme's loss on the very images and noise of the
  verdict.

`language model` asks one, as `--llm.*` says, in place of a script.

In every round an oracle starts at the best scheme that it knows, one of the offline proxy's at
first, and takes a change that is better by what it knows, again and again, the likeliest by the
predictions first: a step of one unit narrower or wider, or a step of one exchanged for a step of
another, whereupon the knapsack fits the other units to the limit. It ends where none of the some
300 changes is better, or after `--num-known` schemes, which the record says. Then it has the best
schemes measured that it knows, so that all of its measurements are spent. That is no proof of the
least loss there is: what no such change leads to may be better still.

A search chooses among what was measured as it always does. The rows "its own choice" take of each
oracle the scheme that it knows to be its best instead. That of the judge's bounds from above what
a partner can gain in the verdict, as far as such a search reaches, for its choice fits the
verdict's noise, too; fresh noise of the same images shows what is left of that. All are judged on
images that no choice but that oracle's was made by, on two draws of noise: the loss and the mean
square distance from the base's prediction, with Student's 95 % interval of the difference from the
offline proxy over the images of all seeds, the noise of each averaged before.

Hardware and hours: `digits` at most half an hour a seed and setting on a free CPU core (as
reckoned from single measurements, each of about a second), nearly all of it the oracles, in
proportion to `--num-known`; interrupted, it resumes.

The paper has no such table.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Literal, get_args

import numpy as np
from common import Flags, base_of, claim, commits_of, parse_flags
from loss_after_pruning import search_of
from numpy.typing import NDArray
from output import write_record, write_table
from proxy_cost import offline_again

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.config.prune import ProxyMethod
from tdc_ray.config.run import RunConfig
from tdc_ray.execution.chain import Chain, run_chain
from tdc_ray.models.units import KeptIndices
from tdc_ray.pruning.changes import Bound, Change, Distrust, Move, Planner
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.fingerprint import IMAGES_VERSION
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.knapsack import step_worth
from tdc_ray.pruning.loaded_base import LoadedBase, load_base, prune_and_refit
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.noised import Purpose, noised_indices, run_all
from tdc_ray.pruning.predictor import Predictor
from tdc_ray.pruning.proxies.language_model import language_model_proxy
from tdc_ray.pruning.proxies.offline import offline_proxy
from tdc_ray.pruning.proxy import Proposal, ProposalRequest, Proxy, Round
from tdc_ray.pruning.result import SearchCost, SearchResult
from tdc_ray.pruning.search import search_submodel
from tdc_ray.pruning.space import Scheme, Values, fit_to_limit
from tdc_ray.runs.stages.paired_losses import difference_of, mean_by_image
from tdc_ray.storage.files import append_json_line, read_json_lines

MAX_TRIES = 50
"""Changes that a partner suggests in a round, at most."""

NUM_TRUE, NUM_JUDGED = 512, 4096
"""Noised images that an oracle's knowledge, and the judgement, rest on."""

VERDICT_SHARE = 0.25
"""Of the judged: the first, which are the verdict's, and which the oracle of the judge knows. The
others are the fresh noise."""

SMOKE_IMAGES = 64

ByImage = NDArray[np.float64]

TWICE = "offline, twice the measurements"

ScriptedName = Literal["random", "greedy", "nonsense", "oracle", "oracle of the judge"]
PartnerName = Literal[ScriptedName, "language model"]

Partner = Callable[[Round, Planner, np.random.Generator], Change]
"""Suggests changes for one measurement."""

Knowledge = Callable[[KeptIndices], float]
"""What an oracle knows of a sub-model: lower is better."""

Value = Callable[[LoadedBase, KeptIndices], float]
"""How it comes to know that."""


@dataclass(frozen=True)
class Found:
    """What the search by a partner came to."""

    by_image: ByImage
    """The loss above the base's and the distance of every judged image: ``(2, images)``."""
    num_measured: int
    notes: list[str]
    """What oracles say of their search."""
    rank: float | None
    """By which finalists are chosen, on held-out images and noise: the lowest wins."""


@dataclass(frozen=True, kw_only=True)
class PartnerFlags(Flags):
    """Flags of this experiment."""

    settings: tuple[str, ...] = ("all",)
    """Which timesteps to prune on: all, or group 0, 3, 4 or 6 of ten."""
    num_rounds: int = 3
    """Rounds of a search."""
    num_candidates: int = 3
    """Measurements of a round."""
    num_known: int = 250
    """Schemes that an oracle may come to know in a round."""
    partners: tuple[PartnerName, ...] = get_args(ScriptedName)
    """Which partners; the oracles take nearly all of the time."""
    llm: ProxyConfig = field(default_factory=ProxyConfig)
    """The language model, if it is one of the partners."""

    def config(self, seed: int) -> RunConfig:
        """Return the preset's settings for one seed and this language model."""
        return replace(super().config(seed), proxy=self.llm)


def randomly(round_: Round, planner: Planner, draw: np.random.Generator) -> Change:
    """Pin one to three units a step beside the knapsack's width."""
    space, bounds = round_.request.space, []
    for number in draw.choice(len(space.units), min(3, len(space.units)), replace=False):
        name = space.units[number].name
        step = space.next_wider if draw.random() < 0.5 else space.next_narrower
        width = step(name, planner.start.scheme[name])
        bounds.append(Bound(unit=int(number), least=width, most=width))
    return Change(bounds=bounds[: int(draw.integers(1, 4))])


def greedily(round_: Round, planner: Planner, draw: np.random.Generator) -> Change:
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


def nonsensically(round_: Round, planner: Planner, draw: np.random.Generator) -> Change:
    """Suggest random changes of units and blocks, some of which exist."""
    count, blocks = len(round_.request.space.units), [*planner.blocks, "nowhere"]
    low, high = np.sort(draw.integers(0, 100, 2))
    return Change(
        bounds=[Bound(unit=int(draw.integers(2 * count)), least=int(low), most=int(high))],
        distrust=[
            Distrust(where=str(number), factor=10 ** float(draw.uniform(-1.2, 1.2)))
            for number in draw.integers(0, 2 * count, count)
        ],
        moves=[
            Move(
                from_block=str(draw.choice(blocks)),
                to_block=str(draw.choice(blocks)),
                points=float(draw.uniform(-5, 20)),
            )
        ],
    )


IGNORANT: Mapping[PartnerName, Partner] = {
    "random": randomly,
    "greedy": greedily,
    "nonsense": nonsensically,
}


def distance_held_out(base: LoadedBase, kept: KeptIndices) -> float:
    """Return the distance that finalists are chosen by."""
    network, batches = prune_and_refit(base, kept).network, base.batches("held-out")
    found = run_all([base.network, network], batches, base.schedule, "fp32")
    return float(found.distances[1].mean())


def loss_of_verdict(base: LoadedBase, kept: KeptIndices) -> float:
    """Return the loss on the images and noise of the verdict."""
    network, batches = prune_and_refit(base, kept).network, base.batches("judge", VERDICT_SHARE)
    return float(run_all([network], batches, base.schedule, "fp32").losses[0].mean())


KNOWING: Mapping[PartnerName, tuple[Purpose, Value]] = {
    "oracle": ("held-out", distance_held_out),
    "oracle of the judge": ("judge", loss_of_verdict),
}


def exchanged(
    request: ProposalRequest, scheme: Scheme, worth: Values, giving: str | None, taking: str | None
) -> Scheme:
    """Narrow a unit and widen another by a step each, and fit the others to the limit.

    Args:
        request: The space and the limit.
        scheme: What is changed.
        worth: Value of every step, by which the others are fitted.
        giving: The unit that gets narrower, if any.
        taking: The one that gets wider, if any.

    Returns:
        The scheme itself where that is not possible.
    """
    space, pins = request.space, dict[str, int]()
    for name, step in ((giving, space.next_narrower), (taking, space.next_wider)):
        if name is not None:
            pins[name] = step(name, scheme[name])
    legal = {**space.legal, **{name: (width,) for name, width in pins.items()}}
    pinned = replace(space, legal=legal)
    is_possible = all(scheme[name] != width for name, width in pins.items())
    if not is_possible or space.cost(pinned.smallest) > request.limit:
        return scheme
    return fit_to_limit(pinned, {**scheme, **pins}, request.limit, worth)


def all_knowing(known: Knowledge, num_known: int) -> Proxy:
    """Return the proxy that searches by what it knows, and has the best that it found measured.

    Args:
        known: What it knows.
        num_known: How many schemes more it may come to know in a round.
    """
    values: dict[tuple[tuple[str, int], ...], float] = {}

    def proxy(search: GroupSearch, round_: Round, cost: SearchCost) -> Chain[None]:
        del search
        request, memory = round_.request, round_.memory
        space, predictor = request.space, Predictor.of(request, memory)
        worth = step_worth(space, predictor.curves, predictor.factors)

        def value(scheme: Scheme) -> float:
            key = tuple(sorted(scheme.items()))
            if key not in values:
                values[key] = known(select_top(space.units, request.scores, scheme))
            return values[key]

        for entry in memory:
            value(entry.widths)
        limit, names = len(values) + num_known, [None, *(unit.name for unit in space.units)]
        ended = "no change of the best is better"
        best: Scheme | None = dict(min(values, key=values.__getitem__))
        while best is not None:
            pairs = permutations(names, 2)
            changes = [exchanged(request, best, worth, *pair) for pair in pairs]
            least, best = value(best), None
            for scheme in sorted(changes, key=predictor.increase):
                if len(values) >= limit:
                    ended = "cut off"
                    break
                if value(scheme) < least:
                    best = scheme
                    break
        cost.notes.append(f"round {request.round}: {len(values)} schemes are known, {ended}")
        schemes = [dict(key) for key in sorted(values, key=values.__getitem__)]
        yield from round_.measure([Proposal("llm", scheme) for scheme in schemes])

    return proxy


def scripted(partner: Partner, seed: int) -> Proxy:
    """Return the proxy that answers as a language model would, by a script."""
    draw = np.random.default_rng(seed)

    def proxy(search: GroupSearch, round_: Round, cost: SearchCost) -> Chain[None]:
        del search, cost
        planner = Planner(round_.request, round_.memory)
        for _ in range(MAX_TRIES):
            if not round_.left:
                return
            planned = planner.plan(partner(round_, planner, draw))
            if planner.objection(planned) is None:
                yield from round_.measure([Proposal("llm", planned.scheme)])

    return proxy


def knowledge_of(
    search: GroupSearch,
    purpose: Purpose,
    num_images: int,
    value: Value,
    folder: Path,
    setting: str,
) -> Knowledge:
    """Return what measures sub-models for a purpose, each once, and keeps that in a file."""
    path = folder / f"known-{setting}-{purpose}-{num_images}-images-v{IMAGES_VERSION}.jsonl"
    prune = replace(search.context.prune, num_images=num_images)
    base = load_base(replace(search.context, prune=prune), search.group)
    found: dict[str, float] = dict(read_json_lines(path))

    def known(kept: KeptIndices) -> float:
        key = str(sorted(kept.items()))
        if key not in found:
            found[key] = value(base, kept)
            append_json_line(path, [key, found[key]])
        return found[key]

    return known


def judged(
    search: GroupSearch, schemes: Mapping[str, KeptIndices], num_images: int
) -> list[dict[str, ByImage]]:
    """Measure refitted models beside the base on images that no choice is made by.

    Args:
        search: Of the group; its base is pruned.
        schemes: What each model keeps.
        num_images: Noised images to measure on.

    Returns:
        On the verdict's noise, and on fresh noise: for each model the loss above the base's, and
        the distance from the base's prediction, of every image: ``(2, images)``.
    """
    prune = replace(search.context.prune, num_images=num_images)
    base = load_base(replace(search.context, prune=prune), search.group)
    distinct = {str(kept): kept for kept in schemes.values()}
    networks = [prune_and_refit(base, kept).network for kept in distinct.values()]
    found = run_all([base.network, *networks], base.batches("judge"), base.schedule, "fp32")
    images = noised_indices(base.context, search.group, purpose="judge", count=num_images)
    losses = [losses.cpu().numpy() for losses in found.losses]
    first = round(VERDICT_SHARE * num_images)
    draws: list[dict[str, ByImage]] = []
    for part in (slice(0, first), slice(first, None)):
        by_scheme = {}
        for kept, loss, distance in zip(distinct, losses[1:], found.distances[1:], strict=True):
            values = np.stack([loss - losses[0], distance.cpu().numpy()])
            by_scheme[kept] = mean_by_image(values[:, part], images[part])
        draws.append({name: by_scheme[str(kept)] for name, kept in schemes.items()})
    return draws


def search_by_all(flags: PartnerFlags, seed: int, setting: str) -> list[dict[str, Found]]:
    """Search a seed's base by every partner, and judge what each search came to; see `judged`."""
    config, base = flags.config(seed), base_of(flags, seed)
    prune = replace(config.prune, num_rounds=flags.num_rounds, num_candidates=flags.num_candidates)
    config = replace(config, prune=prune)
    place = flags.storage / f"partner_bound-{flags.variant}" / f"seed-{seed}"
    claim(place, config)
    schemes: dict[str, KeptIndices] = {}
    results: dict[str, SearchResult] = {}

    def searched(name: str, proxy: Proxy) -> GroupSearch:
        search = search_of(config, base, place / name.replace(" ", "-"), setting, "second-order")
        method: ProxyMethod = "offline" if proxy is offline_proxy else "llm"
        prune = replace(search.context.prune, method=method)
        search = replace(search, context=replace(search.context, prune=prune))
        memory = MemoryBank(search.context.run_dir.memory)
        proxies: dict[ProxyMethod, Proxy] = {"offline": offline_proxy, method: proxy}
        results[name] = run_chain(search_submodel(search, memory, proxies))
        schemes[name] = results[name].kept
        return search

    search = searched("offline", offline_proxy)
    searched(TWICE, offline_again)
    few, many = (SMOKE_IMAGES, 4 * SMOKE_IMAGES) if flags.smoke else (NUM_TRUE, NUM_JUDGED)
    for name in flags.partners:
        if name == "language model":
            searched(name, language_model_proxy)
            continue
        if name in IGNORANT:
            searched(name, scripted(IGNORANT[name], seed))
            continue
        purpose, value = KNOWING[name]
        count = many if purpose == "judge" else few
        known = knowledge_of(search, purpose, count, value, place, setting)
        searched(name, all_knowing(known, 20 if flags.smoke else flags.num_known))
        own = f"{name}, its own choice"
        results[own] = results[name]
        schemes[own] = min((one.kept for one in results[name].candidates), key=known)
    return [
        {
            name: Found(
                images[name],
                len(result.candidates),
                result.cost.notes,
                _final_rank(result, schemes[name]),
            )
            for name, result in results.items()
        }
        for images in judged(search, schemes, many)
    ]


def _final_rank(result: SearchResult, kept: KeptIndices) -> float | None:
    """Return a finalist's rank, the lowest of which a search chooses; None of others."""
    finals = [one.entry.final for one in result.candidates if one.kept == kept]
    return min((final.rank for final in finals if final is not None), default=None)


def compared(one: Sequence[ByImage], offline: Sequence[ByImage]) -> list[dict[str, float]]:
    """Compare loss and distance with the offline proxy's, over the images of all seeds."""
    rows = []
    for which in range(2):
        pair = np.stack(
            [np.concatenate([seed[which] for seed in all_]) for all_ in (one, offline)]
        )
        found = difference_of(pair)
        rows.append(
            {
                "mean": found.loss_tdc,
                "difference": found.difference,
                "low": found.low,
                "high": found.high,
            }
        )
    return rows


def main(flags: PartnerFlags) -> None:
    """Search by every partner, judge, and write the table after each seed."""
    folder = flags.storage / f"partner_bound-{flags.variant}"
    found: dict[str, dict[str, list[Found]]] = {}
    for seed in flags.seeds:
        for setting in flags.settings:
            names = f"{setting}, the verdict's noise", f"{setting}, fresh noise"
            for noise, by_name in zip(names, search_by_all(flags, seed, setting), strict=True):
                for name, one in by_name.items():
                    found.setdefault(noise, {}).setdefault(name, []).append(one)
            write_all(folder, flags, found)


def write_all(
    folder: Path,
    flags: PartnerFlags,
    found: Mapping[str, Mapping[str, Sequence[Found]]],
) -> None:
    """Write what there is so far."""
    rows, record = [], {}
    for setting, by_name in found.items():
        images = {name: [one.by_image for one in seeds] for name, seeds in by_name.items()}
        for name, seeds in by_name.items():
            both = compared(images[name], images["offline"])
            against_twice = compared(images[name], images[TWICE])
            row = [setting, name, f"{mean(one.num_measured for one in seeds):.3g}"]
            for one in both:
                row.append(f"{one['mean']:.4g}")
                interval = f"{one['difference']:+.2g} [{one['low']:.2g}, {one['high']:.2g}]"
                row.append("" if name == "offline" else interval)
            rows.append([*row, str(len(seeds))])
            loss, distance = (np.stack([one.mean(axis=1) for one in images[name]]).T).tolist()
            record[f"{setting}, {name}"] = {
                "loss above the base's": both[0] | {"seeds": loss},
                "distance": both[1] | {"seeds": distance},
                "loss, against twice offline": against_twice[0],
                "distance, against twice offline": against_twice[1],
                "measured": [one.num_measured for one in seeds],
                "final rank": [one.rank for one in seeds],
                "notes": [one.notes for one in seeds],
            }
    against = "less offline's, 95 %"
    columns = ["timesteps", "partner", "measured", "loss above the base's", f"loss {against}"]
    columns += ["distance", f"distance {against}", "seeds"]
    write_table(folder, "partner_bound", columns, rows)
    write_record(folder, "partner_bound", flags, commits_of(folder), {"partners": record})


if __name__ == "__main__":
    main(parse_flags(__doc__, PartnerFlags))

"""What pruning costs: every method's loss after pruning and after the refit, on noise unseen.

    python experiments/loss_after_pruning.py --preset digits
    python experiments/loss_after_pruning.py --smoke

Bases are pruned to 0.7 F on all timesteps, and on groups 0, 3, 4 and 6 of 10: by every score as a
uniform ratio, as a global ranking and as a global ranking per mac, and by the offline proxy with
sensitivities that a quadratic model predicts, also beside rivals (global rankings by Taylor and
Diff-Pruning, or, where asked for, a uniform ratio), and with measured ones. All losses are means
over 4 x 1,024 noised images, of the half of the held-out images that no choice is made by. The
best of each search is held against two refitted baselines, by the paired difference with Student's
95 % interval over the images, the noise of each averaged before: the one that is chosen as the
search chooses, on the other half of the held-out images, and the one that turns out best on these
very images, which favours it.

Hardware and hours: `digits` about 1 on 2 CPU cores; interrupted, it resumes.

The paper has no such table; its Table V compares methods after fine-tuning, by FID
(pruning_methods.py). What is aimed at stands in AIMS, and what came out is printed beside it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import numpy as np
from common import Flags, base_of, claim, commits_of, parse_flags, workers
from numpy.typing import NDArray
from output import write_record, write_table

from tdc_ray.config.prune import Rival, ScoreMethod
from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import TimestepGroup, one_group, plan_groups
from tdc_ray.models.families import family_of
from tdc_ray.models.unet2d.unet import unet_config
from tdc_ray.models.units import KeptIndices
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import load_base, prune_and_refit
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.noised import noised_indices, run_all
from tdc_ray.pruning.result import SearchResult
from tdc_ray.pruning.search import search_submodel
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.runs.stages.paired_losses import difference_of, mean_by_image
from tdc_ray.storage.files import atomic_path, exists, fetch
from tdc_ray.storage.run_dir import RunDir

MACS_SHARE = 0.7
SETTINGS = ("all", "group 0", "group 3", "group 4", "group 6")
SCORES: tuple[ScoreMethod, ...] = ("random", "magnitude", "lamp", "taylor", "diff-pruning")
NUM_IMAGES, SMOKE_IMAGES = 4096, 64
AIMS = (
    "a search's best after the refit: below the best refitted baseline by a 95 % interval of the "
    "paired difference over the images of all seeds in at least four of the five settings, and "
    "above it in none",
)

LossArray = NDArray[np.float64]

Search = Literal[
    "second-order", "second-order with rivals", "second-order with uniform", "measured"
]
"""A search by the offline proxy."""

RIVALS: Mapping[str, tuple[Rival, ...]] = {
    "second-order with rivals": ("taylor", "diff-pruning"),
    "second-order with uniform": ("uniform",),
}

Losses = dict[str, LossArray]
"""Losses above the base's of every noised image, or of every image, by names such as
``taylor/global, refit``."""

Cell = tuple[int, str]
"""A seed and a setting."""

Comparisons = dict[str, dict[str, Any]]
"""What :func:`compared` returns, by setting and search."""


@dataclass(frozen=True, kw_only=True)
class LossFlags(Flags):
    """Flags of this experiment."""

    settings: tuple[str, ...] = SETTINGS
    """Which timesteps to prune on."""
    searches: tuple[Search, ...] = ("second-order", "second-order with rivals", "measured")
    """How the offline proxy knows what pruning a unit costs: a search for each."""


def groups_of(config: RunConfig) -> dict[str, TimestepGroup]:
    """Return the timesteps of each setting, all with the same limit."""
    plan = plan_groups(config.diffusion, replace(config.plan, num_groups=10), config.sampler)
    last = config.diffusion.num_train_timesteps - 1
    found = {"all": one_group(config.diffusion, config.sampler, (0, last), MACS_SHARE)}
    found |= {f"group {group.index}": group for group in plan.groups}
    return {name: replace(found[name], limit_share=MACS_SHARE) for name in SETTINGS}


def search_of(
    config: RunConfig, base: Path, folder: Path, setting: str, name: ScoreMethod | Search
) -> GroupSearch:
    """Return the search by a score, or by the offline proxy with some kind of sensitivity."""
    match name:
        case "measured":
            prune = replace(config.prune, method="offline", sensitivity="measured")
        case "second-order" | "second-order with rivals" | "second-order with uniform":
            rivals = RIVALS.get(name, ())
            prune = replace(
                config.prune, method="offline", sensitivity="second-order", rivals=rivals
            )
        case _:
            prune = replace(config.prune, method=name)
    place = folder / setting.replace(" ", "-") / name.replace(" ", "-")
    run_dir = RunDir(place.resolve(), base)
    space = space_of(unet_config(base), prune.space)
    context = pruning_context(run_dir, replace(config, prune=prune))
    return GroupSearch(context, space, groups_of(config)[setting])


def schemes_of(searched: Mapping[str, SearchResult]) -> dict[str, KeptIndices]:
    """Return every baseline's pruned model, and the best of each search by the proxy."""
    schemes = {}
    for name, result in searched.items():
        for candidate in result.candidates[: None if name in SCORES else 1]:
            schemes[candidate.entry.source if name in SCORES else name] = candidate.kept
    return schemes


def judged(search: GroupSearch, schemes: Mapping[str, KeptIndices], num_images: int) -> Losses:
    """Prune, refit and measure models on images that no choice was made by.

    Args:
        search: Of the group; its base is pruned.
        schemes: What each model keeps.
        num_images: Noised images to measure on.
    """
    prune = replace(search.context.prune, refit="least-squares", num_images=num_images)
    base = load_base(replace(search.context, prune=prune), search.group)
    batches, losses = list(base.batches("judge")), Losses()
    for name, kept in schemes.items():
        cut = family_of(base.network).cut(base.network, base.space.units, kept)
        networks = [base.network, cut, prune_and_refit(base, kept).network]
        found = run_all(networks, batches, base.schedule, prune.precision).losses
        of_base, of_cut, of_refit = (tensor.cpu().numpy() for tensor in found)
        losses |= {name: of_cut - of_base, f"{name}, refit": of_refit - of_base}
    return losses


def saved(path: Path, search: GroupSearch, schemes: Mapping[str, KeptIndices], n: int) -> Losses:
    """Return what :func:`judged` finds, or found before."""
    losses: Losses = {}
    if exists(path):
        with np.load(fetch(path)) as arrays:
            losses = {name: arrays[name] for name in arrays.files}
    if missing := {name: kept for name, kept in schemes.items() if name not in losses}:
        losses |= judged(search, missing, n)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **losses)
    return losses


def by_image(losses: Losses, search: GroupSearch, num_images: int) -> Losses:
    """Average what :func:`judged` finds over the noise of every image."""
    images = noised_indices(search.context, search.group, purpose="judge", count=num_images)
    return {name: mean_by_image(values, images) for name, values in losses.items()}


def chosen_baseline(searched: Mapping[str, SearchResult]) -> str:
    """Return the baseline that is best on the images and noise that finalists are chosen by."""
    entries = [searched[name].candidates[0].entry for name in SCORES]
    return min(entries, key=lambda entry: (entry.final or entry).rank).source


def pairs(losses: Losses, name: str, chosen: str) -> dict[str, tuple[str, LossArray]]:
    """Put a search's best beside two refitted baselines: the baseline, and losses of both.

    Args:
        losses: Of every image.
        name: The search.
        chosen: The baseline that is chosen as the search chooses; the other is the best of
            ``losses``.
    """
    baselines = [other for other in losses if "/" in other and other.endswith(", refit")]
    best = min(baselines, key=lambda other: losses[other].mean())
    return {
        kind: (baseline, np.stack([losses[f"{name}, refit"], losses[baseline]]))
        for kind, baseline in (("chosen", f"{chosen}, refit"), ("best", best))
    }


def compared(paired: Mapping[str, tuple[str, LossArray]]) -> dict[str, Any]:
    """Compare a search's best with each baseline, by losses of every image."""
    found: dict[str, Any] = {}
    for kind, (baseline, losses) in paired.items():
        one = difference_of(losses)
        found[kind] = {
            "baseline": baseline,
            "difference": one.difference,
            "low": one.low,
            "high": one.high,
        }
    return found


def over_seeds(paired: Mapping[str, Sequence[Mapping[str, tuple[str, LossArray]]]]) -> Comparisons:
    """Compare over the images of all seeds: each image of each base counts once.

    Args:
        paired: :func:`pairs` of every seed, by setting and search.
    """
    return {
        name: compared(
            {
                kind: (
                    ", ".join(dict.fromkeys(seed[kind][0] for seed in seeds)),
                    np.concatenate([seed[kind][1] for seed in seeds], axis=1),
                )
                for kind in ("chosen", "best")
            }
        )
        for name, seeds in paired.items()
    }


def main(flags: LossFlags) -> None:
    """Prune, measure, and write the tables."""
    folder = flags.storage / f"loss_after_pruning-{flags.variant}"
    settings = SETTINGS[-1:] if flags.smoke else flags.settings
    names = (*SCORES, *flags.searches)
    tasks: dict[Cell, dict[str, GroupSearch]] = {}
    for seed in flags.seeds:
        config, base = flags.config(seed), base_of(flags, seed)
        place = folder / f"seed-{seed}"
        claim(place, config)
        for setting in settings:
            tasks[seed, setting] = {
                name: search_of(config, base, place, setting, name) for name in names
            }
    with workers(flags.config(flags.seeds[0]), folder, flags.store) as pool:
        chains = {
            f"{cell}|{name}": search_submodel(task, MemoryBank(task.context.run_dir.memory))
            for cell, by_name in tasks.items()
            for name, task in by_name.items()
        }
        found: dict[str, SearchResult] = pool.run(chains)
    tables: dict[Cell, Losses] = {}
    costs: Comparisons = {}
    paired = defaultdict(list)
    num_images = SMOKE_IMAGES if flags.smoke else NUM_IMAGES
    for cell, by_name in tasks.items():
        searched = {name: found[f"{cell}|{name}"] for name in by_name}
        search = by_name[names[-1]]
        path = search.context.run_dir.root.parent / "judged.npz"
        losses = saved(path, search, schemes_of(searched), num_images)
        tables[cell] = by_image(losses, search, num_images)
        for name in flags.searches:
            cost, key = searched[name].cost, f"seed {cell[0]}, {cell[1]}, {name}"
            of_seed = pairs(tables[cell], name, chosen_baseline(searched))
            paired[f"{cell[1]}, {name}"].append(of_seed)
            costs[key] = compared(of_seed)
            costs[key] |= {"search_macs": cost.macs, "search_seconds": cost.seconds}
        write_all(folder, flags, tables, costs, over_seeds(paired), num_images)


def write_all(
    folder: Path,
    flags: LossFlags,
    tables: Mapping[Cell, Losses],
    costs: Mapping[str, Mapping[str, Any]],
    pooled: Mapping[str, Mapping[str, Any]],
    num_images: int,
) -> None:
    """Write what there is so far: a table, what the aims came to, and every seed's numbers."""
    settings = list(dict.fromkeys(setting for _, setting in tables))
    rows = []
    for name in sorted({name for losses in tables.values() for name in losses}):
        row = [name]
        for setting in settings:
            values = [
                float(losses[name].mean())
                for (_, other), losses in tables.items()
                if other == setting and name in losses
            ]
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
            row.append(f"{mean(values):.3g}{spread} ({len(values)})" if values else "-")
        rows.append(row)
    write_table(folder, "loss_after_pruning", ["loss above the base's (seeds)", *settings], rows)
    for key, found in costs.items():
        print(f"{key}: {found['search_macs']:.3g} macs, {found['search_seconds']:.0f} s")
        print_differences(found)
    for key, found in pooled.items():
        print(f"all seeds, {key}")
        print_differences(found)
    excess = {
        f"seed {seed}, {setting}": {
            name: {
                "mean": float(values.mean()),
                "standard_error": float(values.std() / len(values) ** 0.5),
            }
            for name, values in losses.items()
        }
        for (seed, setting), losses in tables.items()
    }
    record = {
        "aims": AIMS,
        "num_images": num_images,
        "against_baselines": costs,
        "over_seeds": pooled,
    }
    write_record(
        folder, "loss_after_pruning", flags, commits_of(folder), {**record, "excess_loss": excess}
    )


def print_differences(found: Mapping[str, Any]) -> None:
    """Print a search's difference from each baseline, with its interval."""
    for kind in ("chosen", "best"):
        one = found[kind]
        print(
            f"  {one['difference']:+.3g} [{one['low']:.3g}, {one['high']:.3g}] from "
            f"{one['baseline']}, the baseline that is {kind}"
        )


if __name__ == "__main__":
    main(parse_flags(__doc__, LossFlags))

"""Do the base's own samples do in place of its data set? Training-free experts by both.

    python experiments/no_data_set.py --preset digits
    python experiments/no_data_set.py --preset mnist --data mnist10k.npz
    python experiments/no_data_set.py --smoke

Experts of one base for every training seed, pruned and refitted without a gradient step: by
images of its data set, and by images that were drawn from the base itself (`--data base`), as many
as a run draws or `--num-samples`. Their losses above the base's are measured on real images that
are held out from both, and on the same noise: paired by image, with Student's 95 % interval, for
every group and over all timesteps alike. Scores, against the data set in both cases, are of one
sampling seed. Both are sampled with, and limited by, the preset's plan and sampler.

Hardware and hours: with `--architecture tiny --plans 0.5 4 --no-scores` some two minutes of a CPU
core beside the base; the presets' own networks were not run. Interrupted, it resumes.

The paper has no such table: it has the data sets of all its bases.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from common import ScoreFlags, base_of, commits_of, parse_flags, workers
from numpy.typing import NDArray
from output import mean_and_spread, plot_bars, write_record, write_table
from stages import Model, experts_of, scores_of

from tdc_ray.config.run import RunConfig, with_data
from tdc_ray.diffusion.plan import TimestepGroup, plan_groups
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.models.families import load_network
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.unet import unet_config
from tdc_ray.pruning.noised import run_all
from tdc_ray.runs.stages.base_samples import draw_base_samples, drawing_macs, with_base_samples
from tdc_ray.runs.stages.paired_losses import difference_of, unseen_batches, unseen_images
from tdc_ray.storage.run_dir import RunDir

REAL, DRAWN = "data set", "base's samples"
NUM_NOISED, SMOKE_NOISED = 4096, 90

LossArray = NDArray[np.float64]
"""``(3, images)``: losses of the base, of experts by real images, of experts by drawn ones."""


@dataclass(frozen=True, kw_only=True)
class DataFlags(ScoreFlags):
    """Flags of this experiment."""

    num_samples: int | None = None
    """Images that are drawn from the base; default: as many as a run draws."""
    plans: tuple[tuple[float, int], ...] = ((0.5, 4), (0.3, 4))
    """Pairs of k and N."""
    scores: bool = True
    """Whether images are scored, too; else losses alone are measured."""


def config_of(flags: DataFlags, seed: int, plan: tuple[float, int]) -> RunConfig:
    """Return the settings of training-free experts by images of the data set."""
    config = flags.config(seed)
    noised = SMOKE_NOISED if flags.smoke else NUM_NOISED
    return replace(
        config,
        plan=replace(config.plan, min_macs_share=plan[0], num_groups=plan[1]),
        finetune=replace(config.finetune, num_steps=0),
        compare=replace(config.compare, num_images=noised),
    )


def without_data(config: RunConfig, base: Path, num_samples: int | None) -> RunConfig:
    """Return the same settings by images that are drawn from the base."""
    data = replace(config.data, source="digits", path=None)  # in two steps, as each is checked
    data = replace(data, source="base", num_images=num_samples)
    return with_base_samples(with_data(config, data), base.resolve())


def losses_of(
    config: RunConfig, group: TimestepGroup, base: Path, experts: Mapping[str, Path]
) -> LossArray:
    """Measure base and both experts of a group on held-out real images, each one's noise averaged.

    Args:
        config: The settings, by images of the data set.
        group: The group.
        base: The base's UNet.
        experts: Folders of all experts, by what they were made with.
    """
    places = [RunDir(experts[kind].parent).expert(group.index) for kind in (REAL, DRAWN)]
    networks = [load_network(base), *map(load_expert, places)]
    batches = unseen_batches(config, group, networks)
    schedule = noise_schedule(config.diffusion)
    found = run_all(networks, batches, schedule, config.prune.precision).losses
    each = np.stack([losses.cpu().numpy() for losses in found])
    return each.reshape(len(networks), -1, len(unseen_images(config))).mean(1)


def compared(losses: LossArray) -> dict[str, float]:
    """Compare the losses of experts by drawn images with those by real ones."""
    of_base, of_real, of_drawn = losses
    found = difference_of(np.stack([of_drawn, of_real]))
    return {
        "loss_base": float(of_base.mean()),
        f"{REAL}, above the base's": float((of_real - of_base).mean()),
        f"{DRAWN}, above the base's": float((of_drawn - of_base).mean()),
        **{name: value for name, value in asdict(found).items() if name in ("low", "high")},
        "difference": found.difference,
    }


def main(flags: DataFlags) -> None:
    """Make all experts, measure and score them, and write the tables."""
    folder = flags.storage / f"no_data_set-{flags.variant}"
    plans = flags.plans[:1] if flags.smoke else flags.plans
    bases = {seed: base_of(flags, seed) for seed in flags.seeds}
    macs_base = network_structure(unet_config(bases[flags.seeds[0]])).macs
    losses: dict[str, dict[int, dict[str, float]]] = {}
    scores: dict[str, list[float]] = {}
    metric, drawn_macs = "", 0.0
    with workers(flags.config(flags.seeds[0]), folder, flags.store) as pool:
        for seed, base in bases.items():
            models = {"base": Model("base", base, macs_base)}
            for k, groups in plans:
                row = f"k {k:g}, N {groups}"
                config = config_of(flags, seed, (k, groups))
                drawn = without_data(config, base, flags.num_samples)
                pool.run({"base samples": draw_base_samples(drawn, base.resolve())})
                drawn_macs = drawing_macs(drawn, macs_base)
                for kind, ways in ((REAL, config), (DRAWN, drawn)):
                    name = f"{row}, {kind}"
                    place = name.replace(", ", "-").replace(" ", "-").replace("'", "")
                    root = folder / f"seed-{seed}" / place
                    models[name] = experts_of(pool, ways, base, root)
                paths = {kind: models[f"{row}, {kind}"].path for kind in (REAL, DRAWN)}
                plan = plan_groups(config.diffusion, config.plan, config.sampler)
                found = [losses_of(config, group, base, paths) for group in plan.groups]
                for group, one in zip(plan.groups, found, strict=True):
                    losses.setdefault(f"{row}, group {group.index}", {})[seed] = compared(one)
                shares = np.array([len(group.timesteps) for group in plan.groups], np.float64)
                whole = np.stack(found, axis=-1) @ (shares / shares.sum())
                losses.setdefault(f"{row}, all", {})[seed] = compared(whole)
            if not flags.scores:
                continue
            scored = config_of(flags, seed, plans[0])
            metric, found_scores = scores_of(
                pool, scored, folder / f"seed-{seed}" / "scores", models, (0,)
            )
            for name, values in found_scores.items():
                scores.setdefault(name, []).extend(values)
    rows = [[row, *_cells(by_seed)] for row, by_seed in losses.items()]
    columns = ["experts", f"by the {REAL}", f"by the {DRAWN}", "difference", "seeds above, below"]
    note = "losses above the base's on held-out real images; in how many seeds the 95 % interval "
    note += "of the difference is above or below 0. "
    if flags.scores:
        named = (f"{name} {mean_and_spread(values)}" for name, values in scores.items())
        note += f"{metric}: " + "; ".join(named)
    write_table(folder, "no_data_set", columns, rows, note)
    bars = scores or _excess_losses(losses)
    plot_bars(folder, "no_data_set", bars, metric or "loss above the base's")
    record = {
        "metric": metric,
        "scores": scores,
        "losses": losses,
        "num_noised": SMOKE_NOISED if flags.smoke else NUM_NOISED,
        "drawing_macs": drawn_macs,
    }
    write_record(folder, "no_data_set", flags, commits_of(folder), record)


def _excess_losses(
    losses: Mapping[str, Mapping[int, Mapping[str, float]]],
) -> dict[str, list[float]]:
    """Return the losses above the base's of every seed, by row and what experts were made with."""
    return {
        f"{row}, by the {kind}": [found[f"{kind}, above the base's"] for found in by_seed.values()]
        for row, by_seed in losses.items()
        for kind in (REAL, DRAWN)
    }


def _cells(by_seed: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Write means over the seeds, and in how many of them the interval excludes 0."""
    names = (f"{REAL}, above the base's", f"{DRAWN}, above the base's", "difference")
    means = [f"{np.mean([found[name] for found in by_seed.values()]):.2e}" for name in names]
    above = sum(found["low"] > 0 for found in by_seed.values())
    below = sum(found["high"] < 0 for found in by_seed.values())
    return [*means, f"{above}, {below} of {len(by_seed)}"]


if __name__ == "__main__":
    main(parse_flags(__doc__, DataFlags))

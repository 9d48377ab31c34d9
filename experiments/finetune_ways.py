"""Which ways of fine-tuning bring an expert's gain into the score, and at which sampler?

    python experiments/finetune_ways.py --preset digits
    python experiments/finetune_ways.py --preset mnist --data mnist.npz
    python experiments/finetune_ways.py --smoke

From one base and at equal train macs: an expert for every group, not pruned, and the base trained
on for as many steps in all, which is one expert for all timesteps; both by every way of
fine-tuning (`--ways`), and averaged with the base by several shares (`--shares`). Scores by
several samplers (`--samplers`), and losses on every group's timesteps, on images and noise that no
training and no choice has seen, with the 95 % interval of their difference from the base trained
on, by the first of the ways and shares.

Hardware and hours: `digits` takes about 1 hour a seed on one CPU core.

The paper does not have this: it names one fine-tune and no base that is trained on.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from common import ScoreFlags, base_of, commits_of, parse_flags, slug, workers
from output import mean_and_spread, plot_bars, write_record, write_table
from stages import Model, experts_of, loss_beside, scores_of

from tdc_ray.config.run import RunConfig
from tdc_ray.config.sampler import Sampler, SamplerConfig
from tdc_ray.diffusion.pipeline_index import INDEX_FILE, PipelineIndex
from tdc_ray.diffusion.plan import TimestepGroup, plan_groups
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.models.saved_expert import SavedExpert, load_expert, save_expert
from tdc_ray.runs.results import LossDifference
from tdc_ray.storage.files import atomic_path, exists, fetch, listing

Way = Literal["constant", "linear", "cosine", "margin", "perturbed", "distilled"]

WAYS: Mapping[Way, Mapping[str, Any]] = {
    "constant": {"lr_schedule": "constant"},
    "linear": {"lr_schedule": "linear"},
    "cosine": {"lr_schedule": "cosine"},
    "margin": {"lr_schedule": "linear", "timestep_margin": 0.1},
    "perturbed": {"lr_schedule": "linear", "input_perturbation": 0.1},
    "distilled": {"lr_schedule": "linear", "distillation_share": 0.5},
}
"""What each way changes of the preset's fine-tune; a teacher's passes come out of the steps."""

LONGER, EXPERTS = "base trained on", "experts"


@dataclass(frozen=True, kw_only=True)
class WaysFlags(ScoreFlags):
    """Flags of this experiment."""

    num_actors: int | None = 1
    """Most actors that work at once; on a cluster give more."""
    ways: tuple[Way, ...] = tuple(WAYS)
    """Names of ways."""
    shares: tuple[float, ...] = (0.0, 0.5)
    """Shares of the weights that the fine-tune began with."""
    samplers: tuple[tuple[Sampler, int], ...] = (
        ("ddim", 20),
        ("ddim", 50),
        ("ddim", 200),
        ("dpmsolver++", 20),
    )
    """Samplers and their steps."""


def models_of(
    pool: Pool, flags: WaysFlags, config: RunConfig, base: Path, root: Path
) -> dict[str, Model]:
    """Train from a base by every way; return all models, averages too, by name."""
    num_groups = len(plan_groups(config.diffusion, config.plan, config.sampler).groups)
    steps = config.finetune.num_steps
    models: dict[str, Model] = {}
    for kind, groups, num_steps in ((LONGER, 1, steps * num_groups), (EXPERTS, num_groups, steps)):
        folder = root / kind.replace(" ", "-")
        settings = replace(
            config,
            plan=replace(config.plan, num_groups=groups),
            prune=replace(config.prune, method="none"),
        )
        start = experts_of(pool, tuned(settings, num_steps=0), base, folder / "start")
        models.setdefault("base", start)
        for way in flags.ways:
            by_way = tuned(settings, num_steps=num_steps, **WAYS[way])
            if by_way.finetune.distillation_share:  # three passes of a step, and the teacher's
                by_way = tuned(by_way, num_steps=round(0.75 * num_steps))
            trained = experts_of(pool, by_way, base, folder / way)
            for share in flags.shares:
                average = averaged(start, trained, share, folder / f"{way}-{share:g}")
                models[f"{kind}, {way}, {share:g} of its start"] = average
    return models


def tuned(config: RunConfig, **changes: Any) -> RunConfig:
    """Return settings with other ones of the fine-tune."""
    return replace(config, finetune=replace(config.finetune, **changes))


def averaged(start: Model, trained: Model, share: float, folder: Path) -> Model:
    """Average experts with what they began as, as `--finetune.average-with-start` does."""
    if share and not exists(folder / INDEX_FILE):
        for path in listing(trained.path, "expert-*"):
            unet, before = load_expert(path), load_expert(start.path / path.name)
            with torch.no_grad():  # as TrainState.ema_weights does
                for one, other in zip(unet.parameters(), before.parameters(), strict=True):
                    one.data = one.lerp(other, share)
            description = SavedExpert.load(path)
            save_expert(folder / path.name, unet, description.unet, description.kept)
        PipelineIndex.load(trained.path).save(folder)
    return replace(trained, path=folder) if share else trained


def sampled_by(model: Model, sampler: SamplerConfig, folder: Path) -> Model:
    """Return the same experts as a pipeline with another sampler, which their index names."""
    if not exists(folder):
        with atomic_path(folder) as copied:
            shutil.copytree(fetch(model.path), copied)
            index = PipelineIndex.load(copied)
            index.model_copy(update={"sampler": sampler}).save(copied)
    return replace(model, path=folder)


def differences(
    pool: Pool, config: RunConfig, models: Mapping[str, Model], folder: Path
) -> dict[str, Sequence[LossDifference]]:
    """Compare each model's loss with the reference's, for every group's timesteps."""
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    against = expert_for(models[reference_of(models)], groups[0])  # it has one for all
    found = pool.run(
        {
            name: loss_beside(
                config,
                groups,
                [expert_for(model, group) for group in groups],
                against,
                folder / slug(name),
            )
            for name, model in models.items()
        }
    )
    return {name: losses.groups for name, losses in found.items()}


def reference_of(names: Iterable[str]) -> str:
    """Return which model losses are compared with: the first base trained on."""
    return next(name for name in names if name.startswith(LONGER))


def expert_for(model: Model, group: TimestepGroup) -> Path:
    """Return the folder of the expert that serves a group's timesteps."""
    index = PipelineIndex.load(model.path)
    return next(
        model.path / expert.folder
        for expert, (first, last) in zip(index.experts, index.spans, strict=True)
        if first <= group.first <= last
    )


def main(flags: WaysFlags) -> None:
    """Train, score and compare for every seed; write the tables and the record."""
    if flags.smoke:
        # Its few steps are all warm-up, so that no schedule of the learning rate differs.
        ways: tuple[Way, ...] = ("constant", "perturbed")
        flags = replace(flags, ways=ways, samplers=(("ddim", 5), ("dpmsolver++", 5)))
    folder = flags.storage / f"finetune_ways-{flags.variant}"
    titles = [f"{sampler} {steps}" for sampler, steps in flags.samplers]
    scores: dict[str, dict[str, list[float]]] = {}
    losses: dict[str, list[Sequence[LossDifference]]] = {}
    metric = ""
    for seed in flags.seeds:
        config, base = flags.config(seed), base_of(flags, seed)
        root = (folder / f"seed-{seed}").resolve()
        with workers(config, root, flags.store) as pool:
            models = models_of(pool, flags, config, base, root)
            for name, found in differences(pool, config, models, root / "losses").items():
                losses.setdefault(name, []).append(found)
            for title, (sampler, steps) in zip(titles, flags.samplers, strict=True):
                how = replace(config.sampler, sampler=sampler, num_inference_steps=steps)
                settings, place = replace(config, sampler=how), root / title.replace(" ", "-")
                pipelines = {
                    name: sampled_by(model, how, place / "pipelines" / slug(name))
                    for name, model in models.items()
                }
                metric, by_model = scores_of(pool, settings, place, pipelines, [0])
                for name, of_seeds in by_model.items():
                    scores.setdefault(name, {}).setdefault(title, []).extend(of_seeds)
    rows = [
        [name, *(mean_and_spread(row[title], 2) for title in titles)]
        for name, row in scores.items()
    ]
    note = f"{metric} by sampler and its steps: mean and standard deviation of the training seeds."
    write_table(folder, "finetune_ways", ["model", *titles], rows, note)
    last = {name: row[titles[-1]] for name, row in scores.items()}
    plot_bars(folder, "finetune_ways", last, f"{metric}, {titles[-1]}")
    write_table(folder, "finetune_losses", *table_of_losses(losses, flags.seeds))
    record = {
        "metric": metric,
        "num_images": config.evaluate.num_images,
        "scores": scores,
        "losses_against": reference_of(losses),
        "losses": {
            name: [[asdict(one) for one in groups] for groups in of_seeds]
            for name, of_seeds in losses.items()
        },
    }
    write_record(folder, "finetune_ways", flags, commits_of(folder), record)


def table_of_losses(
    losses: Mapping[str, Sequence[Sequence[LossDifference]]], seeds: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: relative differences and their intervals, of every group."""
    rows = []
    for name, of_seeds in losses.items():
        for seed, groups in zip(seeds, of_seeds, strict=True):
            cells = []
            for one in groups:
                percent, margin = (
                    100 * value / one.loss_base
                    for value in (one.difference, (one.high - one.low) / 2)
                )
                cells.append(f"{percent:+.2f} ± {margin:.2f} %")
            rows.append([name, str(seed), *cells])
    numbers = map(str, range(len(rows[0]) - 2))
    return [f"loss against {reference_of(losses)}", "seed", *(f"group {n}" for n in numbers)], rows


if __name__ == "__main__":
    main(parse_flags(__doc__, WaysFlags))

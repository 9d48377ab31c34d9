"""Single stages of a run, done apart: untrained bases, searches, experts, scores, losses."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import claim

from tdc_ray.config.run import RunConfig, with_absolute_paths
from tdc_ray.config.train import FinetuneConfig
from tdc_ray.diffusion.pipeline_index import INDEX_FILE
from tdc_ray.diffusion.plan import Plan, TimestepGroup, one_group, plan_groups
from tdc_ray.errors import ConfigError
from tdc_ray.execution.chain import Chain, results_of
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.models.unet2d.unet import build_unet, save_unet, unet_config
from tdc_ray.pruning.group import GroupSearch, group_searches
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.collect_results import mean_over_sampling_steps
from tdc_ray.runs.evaluation.evaluate import Which, evaluate, prepare_features, score
from tdc_ray.runs.evaluation.features import FeatureSpec, choose_features
from tdc_ray.runs.pipelines import save_index
from tdc_ray.runs.results import LossDifference
from tdc_ray.runs.stages.budgets import measured_plan
from tdc_ray.runs.stages.expert import make_expert, pruning_context
from tdc_ray.runs.stages.paired_losses import (
    PairedJob,
    mean_difference,
    paired_difference,
    paired_item,
)
from tdc_ray.storage.files import atomic_path, exists, fetch
from tdc_ray.storage.object_store import is_remote
from tdc_ray.storage.run_dir import RunDir


def untrained_like(base: Path, folder: Path, seed: int) -> Path:
    """Save a UNet of a base's architecture with random weights, unless it is there."""
    if not exists(folder / "config.json"):
        torch.manual_seed(seed)
        config = unet_config(base)
        save_unet(build_unet(config), folder)
    return folder


def from_nothing(config: RunConfig, num_steps: int) -> RunConfig:
    """Train with the base's settings for so many steps, without a refit."""
    return replace(
        config,
        finetune=replace(FinetuneConfig.of(config.base), num_steps=num_steps),
        prune=replace(config.prune, refit="none"),
    )


@dataclass(frozen=True, slots=True)
class Model:
    """Something to sample from."""

    which: Which
    path: Path
    """The base's UNet, or a folder of experts."""
    macs: float
    """Of one denoising step."""


def scores_of(
    pool: Pool, config: RunConfig, folder: Path, models: Mapping[str, Model], seeds: Sequence[int]
) -> tuple[str, dict[str, list[float]]]:
    """Score models by their images of several sampling seeds.

    Args:
        pool: The actors.
        config: How to sample and to score.
        folder: Where images and moments go.
        models: By name.
        seeds: Seeds of the initial noise.

    Returns:
        The metric's name, and every model's scores in the order of the seeds.
    """
    config, folder = with_absolute_paths(config), folder.resolve()
    claim(folder, config)
    spec = choose_features(config.data, config.evaluate, folder / "features.json")
    if spec is None:
        raise ConfigError("evaluate.features must be some where images are scored, got none.")
    reference = RunDir(folder / "reference")
    pool.run({"features": prepare_features(reference, config.data, config.evaluate, spec)})
    chains = {}
    for name, model in models.items():
        for seed in seeds:
            root = folder / name.replace(" ", "-").replace("/", "-") / f"sampling-seed-{seed}"
            run_dir = RunDir(root, model.path.resolve() if model.which == "base" else None)
            if model.which == "tdc" and not exists(run_dir.experts / INDEX_FILE):
                _refer(run_dir.experts, model.path)
            seeded = replace(config, evaluate=replace(config.evaluate, seed=seed))
            chains[f"{name}|{seed}"] = _score(run_dir, seeded, spec, model)
    scores = pool.run(chains)
    by_name = {name: [scores[f"{name}|{seed}"] for seed in seeds] for name in models}
    return spec.metric, by_name


def _refer(path: Path, to: Path) -> None:
    """Link a folder at another path; a store has no links, so there it is copied."""
    if is_remote(path):
        with atomic_path(path) as copied:
            shutil.copytree(fetch(to), copied)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(to.resolve())


def _score(run_dir: RunDir, config: RunConfig, spec: FeatureSpec, model: Model) -> Chain[float]:
    yield from prepare_features(run_dir, config.data, config.evaluate, spec)
    results = []
    for shard in evaluate(run_dir, config, spec, model.which, model.macs).values():
        results.append((yield from shard))
    return score(run_dir, results).score


def searches_of(
    pool: Pool, config: RunConfig, base: Path, run_dir: RunDir
) -> tuple[Plan, list[GroupSearch]]:
    """Return the plan of a run whose base is there, with its limits, and its groups' searches."""
    claim(run_dir.root, config)
    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    space = space_of(unet_config(base), config.prune.space)
    context = pruning_context(run_dir, config, models_all_groups=config.measures_limits)
    tasks = group_searches(context, space, plan.groups)
    if config.measures_limits:
        plan = pool.run({"limits": measured_plan(plan, tasks)})["limits"]
        tasks = group_searches(context, space, plan.groups)
    return plan, tasks


def experts_of(pool: Pool, config: RunConfig, base: Path, root: Path) -> Model:
    """Run stage 2 of a run: all experts from a base, as in a run, without scores."""
    run_dir = RunDir(root.resolve(), base.resolve())
    plan, tasks = searches_of(pool, config, base, run_dir)
    memory = MemoryBank(run_dir.memory)
    done = pool.run(
        {task.name: make_expert(task, memory, config.finetune, config.compute) for task in tasks}
    )
    save_index(run_dir, config, plan.groups)
    macs = mean_over_sampling_steps(plan, [done[task.name].macs for task in tasks])
    return Model("tdc", run_dir.experts, macs)


def all_timesteps(config: RunConfig, base: Path, root: Path, macs_share: float) -> GroupSearch:
    """Return the search of a base for all timesteps at once."""
    claim(root, config)
    span = (0, config.diffusion.num_train_timesteps - 1)
    group = one_group(config.diffusion, config.sampler, span, macs_share)
    space = space_of(unet_config(base), config.prune.space)
    context = pruning_context(RunDir(root.resolve(), base.resolve()), config)
    return GroupSearch(context, space, group)


@dataclass(frozen=True, slots=True)
class Losses:
    """A model's held-out losses against those of the base trained on."""

    mean: LossDifference
    """Over all timesteps alike."""

    groups: Sequence[LossDifference]
    """In the groups' order."""


def loss_beside(
    config: RunConfig,
    groups: Sequence[TimestepGroup],
    networks: Sequence[Path],
    longer_base: Path,
    folder: Path,
) -> Chain[Losses]:
    """Compare the networks of the groups, in their order, with the base trained on."""
    folder = folder.resolve()
    jobs = [
        PairedJob(config, group, network, longer_base, folder / f"losses-{group.index:02d}.npy")
        for group, network in zip(groups, networks, strict=True)
    ]
    items = [paired_item(f"{folder.name}/{job.path.stem}", job, (1.0, 1.0)) for job in jobs]
    yield from results_of(items)
    paths = [job.path for job in jobs]
    return Losses(mean_difference(paths, groups), tuple(map(paired_difference, paths)))

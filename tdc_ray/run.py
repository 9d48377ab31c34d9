"""Algorithm 1 from start to end: plan, base, pruning rounds and fine-tunes, pipeline, scores."""

import importlib.metadata
import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tdc_ray.config import ComputeConfig, RunConfig, differences, from_json, to_json
from tdc_ray.data import load_dataset
from tdc_ray.distributed.base import train_base_on_ray
from tdc_ray.distributed.cluster import board, connected
from tdc_ray.distributed.pool import Pool
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.evaluate import Score, evaluate, prepare_features, score
from tdc_ray.features import FeatureSpec, choose_features
from tdc_ray.finetune import Expert, expert_dir, make_expert
from tdc_ray.layout import RunDir
from tdc_ray.models.architectures import LATENT, architecture
from tdc_ray.pipeline import save_index
from tdc_ray.plan import Plan, plan_groups
from tdc_ray.plan import to_json as plan_to_json
from tdc_ray.progress import ProgressView
from tdc_ray.prune.memory import MemoryBank
from tdc_ray.prune.rounds import GroupTask
from tdc_ray.prune.space import Space, space_of
from tdc_ray.report import plot_plan
from tdc_ray.results import (
    EvaluationResult,
    GroupResult,
    ModelResult,
    PlanResult,
    PruneResult,
    Results,
    StageSeconds,
    load_results,
    save_results,
)
from tdc_ray.storage import exclusive, read_json, write_json

logger = logging.getLogger(__name__)

PACKAGES = ("tdc-ray", "torch", "diffusers", "ray", "numpy", "clean-fid", "scipy")


def run(config: RunConfig, folder: Path, console: Console) -> Results:
    """Do the whole of algorithm 1, or what of it an earlier call has left to do.

    Args:
        config: The settings.
        folder: The run directory. The same call goes on where an earlier one was cut.
        console: Where progress is shown.

    Returns:
        What is then in ``results.json``.

    Raises:
        TdcError: What went wrong, said before work starts wherever that can be known.
    """
    started = time.perf_counter()
    run_dir = RunDir(folder.resolve())
    space, plan = check(config)
    with exclusive(run_dir.root):
        _prepare(run_dir, config, plan)
        if run_dir.results.exists():
            logger.info("%s is finished; nothing is done again", run_dir.root)
            return load_results(run_dir.results)
        spec = choose_features(config, load_dataset(config.data))
        with (
            ProgressView(run_dir.tensorboard, console) as view,
            connected(_local_cpus(config.compute)),
            board(view) as events,
        ):
            logger.info("stage 1: training the base (%s)", run_dir.base_unet)
            train_base_on_ray(run_dir, config, events, view)
            with Pool(config.compute, events, view) as pool:
                experts, reference = _make_experts(run_dir, config, space, plan, spec, pool)
                scores = _evaluate(run_dir, config, space, plan, experts, spec, pool)
        results = _results(run_dir, config, space, plan, experts, scores, spec, reference, started)
        save_results(run_dir.results, results)
        return results


def check(config: RunConfig) -> tuple[Space, Plan]:
    """Find out before any work whether settings, data and limits can go together.

    Raises:
        ConfigError: Settings disagree with the architecture.
        DataError: The data is missing or malformed.
        LimitError: A group's limit is below the smallest pruned model.
    """
    unet_config = architecture(config.model.architecture)
    data, diffusion = config.data, config.diffusion
    if config.model.architecture in LATENT:
        raise ConfigError(
            f"model.architecture {config.model.architecture} denoises latents, and there is no "
            "first stage to encode images yet: it can be planned and counted, not trained."
        )
    expected = data.num_channels * (2 if diffusion.learned_sigma else 1)
    for setting, value, wanted in (
        ("data.image_size", data.image_size, unet_config["sample_size"]),
        ("data.num_channels", data.num_channels, unet_config["in_channels"]),
        ("channels by diffusion.learned_sigma", expected, unet_config["out_channels"]),
    ):
        if value != wanted:
            raise ConfigError(
                f"{setting} must be {wanted} for model.architecture {config.model.architecture}, "
                f"got {value}."
            )
    plan, space = plan_groups(diffusion, config.plan, config.sampler), space_of(unet_config)
    if config.prune.method != "none":
        for group in plan.groups:
            space.check_limit(group.max_macs(space.macs_base), f"group {group.index}")
    load_dataset(data)
    return space, plan


def _prepare(run_dir: RunDir, config: RunConfig, plan: Plan) -> None:
    """Write down settings and versions, or make sure that they are those of an earlier call."""
    if run_dir.config.exists():
        changed = differences(from_json(read_json(run_dir.config)), config)
        if changed:
            raise StorageError(
                f"run directory {run_dir.root} has other settings: {'; '.join(changed)}. "
                "Use the same settings to go on, or another --run-dir."
            )
        return
    write_json(run_dir.environment, {"versions": _versions(), "commit": _commit()} | _machine())
    write_json(run_dir.plan, plan_to_json(plan))
    plot_plan(plan, run_dir.plan_plot)
    write_json(run_dir.config, to_json(config))


def _make_experts(
    run_dir: RunDir,
    config: RunConfig,
    space: Space,
    plan: Plan,
    spec: FeatureSpec,
    pool: Pool,
) -> tuple[list[Expert], str]:
    """Stage 2: all groups side by side; the features are made ready beside them."""
    logger.info("stage 2: %d groups, method %s", len(plan.groups), config.prune.method)
    memory = MemoryBank(run_dir.memory)
    tasks = [GroupTask(run_dir, config, space, group) for group in plan.groups]
    chains: dict[str, Any] = {task.name: make_expert(task, memory) for task in tasks}
    done = pool.run(chains | {"features": prepare_features(run_dir, config, spec)})
    experts = [done[task.name] for task in tasks]
    names = [expert_dir(run_dir, group).name for group in plan.groups]
    save_index(run_dir.experts, config, plan.groups, names)
    return experts, done["features"]


def _evaluate(
    run_dir: RunDir,
    config: RunConfig,
    space: Space,
    plan: Plan,
    experts: Sequence[Expert],
    spec: FeatureSpec,
    pool: Pool,
) -> tuple[Score, Score]:
    """Score the base and the experts on the same noise."""
    logger.info("evaluation: %d images of each model", config.evaluate.num_images)
    base = evaluate(run_dir, config, spec, "base", space.macs_base)
    tdc = evaluate(run_dir, config, spec, "tdc", _mean_macs(plan, experts))
    done = pool.run({**base, **tdc})
    return (
        score(run_dir, config, spec, "base", [done[name] for name in base]),
        score(run_dir, config, spec, "tdc", [done[name] for name in tdc]),
    )


def _results(
    run_dir: RunDir,
    config: RunConfig,
    space: Space,
    plan: Plan,
    experts: Sequence[Expert],
    scores: tuple[Score, Score],
    spec: FeatureSpec,
    reference: str,
    started: float,
) -> Results:
    base, (base_score, tdc_score) = read_json(run_dir.base_result), scores
    sampler, pruned = config.sampler, config.prune.method != "none"
    return Results(
        preset=config.preset,
        seed=config.seed,
        dataset=config.data.name,
        metric=spec.metric,
        base=ModelResult(
            score=base_score.score,
            macs=float(base["macs"]),
            num_params=float(base["num_params"]),
            train_steps=base["train_steps"],
            train_macs=base["train_macs"],
            images_per_second=base_score.images_per_second,
        ),
        tdc=ModelResult(
            score=tdc_score.score,
            macs=_mean_macs(plan, experts),
            num_params=_step_mean(plan, [expert.num_params for expert in experts]),
            train_steps=base["train_steps"] + sum(expert.train_steps for expert in experts),
            train_macs=base["train_macs"] + sum(expert.train_macs for expert in experts),
            images_per_second=tdc_score.images_per_second,
        ),
        plan=PlanResult(
            k=config.plan.min_macs_share,
            num_groups=config.plan.num_groups,
            schedule=config.plan.schedule,
            mean_macs_limit=plan.mean_limit_share * space.macs_base,
            notes=plan.notes,
        ),
        groups=tuple(_group_result(expert) for expert in experts),
        prune=PruneResult(
            method=config.prune.method,
            rounds=config.prune.num_rounds if pruned else 0,
            candidates=config.prune.num_candidates if pruned else 0,
            seconds=sum(expert.choice.seconds for expert in experts),
            search_macs=sum(expert.choice.search_macs for expert in experts),
            prompt_tokens=0,
            completion_tokens=0,
        ),
        evaluation=EvaluationResult(
            sampler=sampler.sampler,
            num_inference_steps=sampler.num_inference_steps,
            eta=sampler.eta,
            seed=config.evaluate.seed,
            num_images=config.evaluate.num_images,
            reference=reference,
            features=spec.extractor,
            weights="EMA",
        ),
        seconds=StageSeconds(
            base=base["seconds"],
            prune=sum(expert.choice.seconds for expert in experts),
            finetune=sum(expert.seconds for expert in experts),
            evaluate=base_score.seconds + tdc_score.seconds,
            wall=time.perf_counter() - started,
        ),
        versions=_versions(),
        commit=_commit(),
    )


def _group_result(expert: Expert) -> GroupResult:
    return GroupResult(
        index=expert.group.index,
        timesteps=(expert.group.first, expert.group.last),
        macs_limit=expert.max_macs,
        macs=expert.macs,
        num_params=expert.num_params,
        widths=expert.choice.widths,
        loss_base=expert.choice.loss_base,
        loss_cut=expert.choice.loss_cut,
        loss_refit=None,
        loss_finetuned=expert.loss_finetuned,
    )


def _mean_macs(plan: Plan, experts: Sequence[Expert]) -> float:
    return _step_mean(plan, [expert.macs for expert in experts])


def _step_mean(plan: Plan, values: Sequence[int]) -> float:
    """Mean over the sampling steps of a value per group."""
    weighted = zip(plan.groups, values, strict=True)
    total = sum(group.num_sampling_steps * value for group, value in weighted)
    return total / len(plan.sampling_timesteps)


def _local_cpus(compute: ComputeConfig) -> int:
    """Logical CPUs of a local Ray: the machine's, or as many as one base worker wants."""
    return max(os.cpu_count() or 1, compute.cpus_per_base_worker * compute.num_base_workers)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found


def _machine() -> dict[str, str]:
    return {"machine": f"{platform.system()} {platform.machine()} {platform.processor()}"}


def _commit() -> str | None:
    """Commit of the checkout the package runs from, marked if changed; None outside of one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty"]
    here = Path(__file__).resolve().parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None

"""Collects the outputs of the stages into the results of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_ray.config.run import RunConfig
from tdc_ray.data.latents import training_data
from tdc_ray.data.survey import images_summary
from tdc_ray.diffusion.plan import Plan
from tdc_ray.execution.item import ItemResult, load_result
from tdc_ray.execution.timeline import WorkerUsage
from tdc_ray.models.first_stage import first_stage_digest
from tdc_ray.pruning.result import contribution_notes, schemes_by_source
from tdc_ray.runs.evaluation.evaluate import Score, num_sampled
from tdc_ray.runs.evaluation.features import FeatureSpec
from tdc_ray.runs.evaluation.held_out import mean_losses
from tdc_ray.runs.evaluation.metrics import metrics_text
from tdc_ray.runs.pretrained.sources import BASE_FILE
from tdc_ray.runs.results import (
    HELD_OUT_LOSS,
    ComparisonResult,
    EvaluationResult,
    ModelResult,
    PlanResult,
    PretrainedBaseResult,
    PruneResult,
    Results,
    ReuseResult,
    StageSeconds,
    TimesResult,
)
from tdc_ray.runs.stages.base_result import BaseResult
from tdc_ray.runs.stages.base_samples import drawing_macs
from tdc_ray.runs.stages.expert import Expert, group_result
from tdc_ray.storage.files import exists, listing, read_json
from tdc_ray.storage.provenance import commit, versions
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """The results of stage 2 and of the evaluation of a run."""

    plan: Plan
    experts: Sequence[Expert]
    """One per group, in order."""

    times: TimesResult
    base: Score
    tdc: Score
    spec: FeatureSpec | None
    """None means that no image was scored."""

    reference: str
    """What the images were compared with, or the losses are of, in words."""

    usage: Sequence[WorkerUsage]
    """Usage of the pool's workers, by phase."""

    has_cache: bool
    """Whether results were shared with other runs."""

    comparison: ComparisonResult | None = None


def collect_results(
    run_dir: RunDir, config: RunConfig, outcome: RunOutcome, seconds: float
) -> Results:
    """Collect the outputs of the stages.

    Args:
        run_dir: Where the base's result is.
        config: The run's settings.
        outcome: The results of the later stages.
        seconds: How long this attempt took.
    """
    plan, experts, prune, sampler = outcome.plan, outcome.experts, config.prune, config.sampler
    spec = outcome.spec
    base = load_result(run_dir.base_result, BaseResult).value
    searched = [expert.search_result for expert in experts]
    costs = [result.cost for result in searched]
    pretrained = _pretrained_base(run_dir)
    num_classes, first_stage = config.conditioning.num_classes, config.data.first_stage
    drawing = drawing_macs(config, base.macs)
    rounds = {"none": 0, "offline": prune.num_rounds, "llm": prune.num_rounds}
    return Results(
        preset=config.preset,
        seed=config.seed,
        dataset=config.data.name,
        metric=HELD_OUT_LOSS if spec is None else spec.metric,
        base=ModelResult(
            score=outcome.base.score,
            macs=float(base.macs),
            num_params=float(base.num_params),
            train_steps=base.train_steps,
            train_macs=base.train_macs,
            images_per_second=outcome.base.images_per_second,
            metrics=outcome.base.metrics,
        ),
        tdc=ModelResult(
            score=outcome.tdc.score,
            macs=mean_over_sampling_steps(plan, [expert.macs for expert in experts]),
            num_params=mean_over_sampling_steps(plan, [expert.num_params for expert in experts]),
            train_steps=base.train_steps + sum(expert.train_steps for expert in experts),
            train_macs=base.train_macs + sum(expert.train_macs for expert in experts),
            images_per_second=outcome.tdc.images_per_second,
            metrics=outcome.tdc.metrics,
        ),
        plan=PlanResult(
            k=config.plan.min_macs_share,
            num_groups=config.plan.num_groups,
            schedule=config.plan.schedule,
            mean_macs_limit=plan.mean_limit_share * base.macs,
            notes=plan.notes,
        ),
        groups=tuple(group_result(expert, base.macs) for expert in experts),
        prune=PruneResult(
            method=prune.method,
            rounds=rounds.get(prune.method, 1),
            candidates=max(
                (e.entry.candidate + 1 for x in experts for e in x.search_result.candidates),
                default=0,
            ),
            seconds=sum(cost.seconds for cost in costs),
            search_macs=sum(cost.macs for cost in costs) + drawing,
            drawing_macs=drawing,
            prompt_tokens=sum(cost.prompt_tokens for cost in costs),
            completion_tokens=sum(cost.completion_tokens for cost in costs),
            proxy_cost=sum(cost.proxy_cost for cost in costs),
            schemes=schemes_by_source(searched),
            proxy_seconds=sum(cost.proxy_seconds for cost in costs),
            refit=prune.refit,
            space=prune.space,
            objective=prune.objective,
            notes=(
                *(contribution_notes(searched) if prune.method == "llm" else ()),
                *(note for cost in costs for note in cost.notes),
            ),
        ),
        evaluation=EvaluationResult(
            sampler=sampler.name,
            num_inference_steps=sampler.num_inference_steps,
            eta=sampler.eta,
            seed=config.evaluate.seed,
            num_images=num_sampled(config.evaluate, spec),
            reference=outcome.reference,
            features="none" if spec is None else spec.extractor,
            weights="EMA" if pretrained is None else f"{pretrained.weights} (base), EMA (experts)",
            precision=config.evaluate.precision,
            num_classes=num_classes,
            labels=_labels(config),
            guidance_scale=sampler.guidance_scale,
            num_features=outcome.tdc.num_features,
            other_metrics=metrics_text(config.evaluate.num_images)
            if outcome.tdc.metrics
            else None,
            first_stage=None if first_stage is None else first_stage_digest(Path(first_stage)),
        ),
        seconds=StageSeconds(
            base=base.seconds,
            prune=sum(cost.seconds for cost in costs),
            finetune=sum(expert.seconds for expert in experts),
            evaluate=outcome.base.seconds + outcome.tdc.seconds,
            wall=seconds,
        ),
        versions=versions(),
        commit=commit(),
        given_base=pretrained,
        workers=tuple(outcome.usage),
        reuse=_reuse(run_dir) if outcome.has_cache else None,
        times=outcome.times,
        comparison=outcome.comparison,
        losses=mean_losses(run_dir, config, plan.groups, "base") if spec is None else None,
        images=images_summary(config.data),
    )


def _labels(config: RunConfig) -> str | None:
    """Return what says of which class, or prompt, an image is."""
    num_classes = config.conditioning.num_classes
    if num_classes is not None:
        return f"image i is of class i mod {num_classes}"
    prompts = training_data(config.data, config.evaluate.cache_dir).prompts()
    if prompts is None:
        return None
    negative = config.sampler.negative_prompt
    away = "" if negative is None else f", away from {negative!r}"
    return f"image i is of prompt i mod {prompts.num_prompts}{away}"


def item_results(run_dir: RunDir) -> list[ItemResult[dict[str, Any]]]:
    """Load the items' results of a finished run, of any type: base, groups and samples."""
    paths = [run_dir.base_result, *listing(run_dir.root, "groups/*/*.json")]
    paths += listing(run_dir.samples, "**/*.json")
    return [load_result(path, dict[str, Any]) for path in paths]


def _reuse(run_dir: RunDir) -> ReuseResult | None:
    """Count what a run's items computed and what they loaded from the cache."""
    marked = [(item.cached.reused, item.value) for item in item_results(run_dir) if item.cached]
    if not marked:
        return None

    def count(*, reused: bool) -> tuple[int, float, float]:
        values = [value for was_reused, value in marked if was_reused == reused]
        train = sum(float(value.get("train_macs", 0.0)) for value in values)
        # The ``macs`` of what trains are the model's, not those that it cost.
        search = [value for value in values if "train_macs" not in value]
        return len(values), train, sum(float(value.get("macs", 0.0)) for value in search)

    computed, reused = count(reused=False), count(reused=True)
    return ReuseResult(
        items_computed=computed[0],
        items_reused=reused[0],
        train_macs_computed=computed[1],
        train_macs_reused=reused[1],
        search_macs_computed=computed[2],
        search_macs_reused=reused[2],
    )


def _pretrained_base(run_dir: RunDir) -> PretrainedBaseResult | None:
    path = run_dir.base / BASE_FILE
    if not exists(path):
        return None
    document = read_json(path)
    return PretrainedBaseResult(
        source=document["source"], files=document["files"], weights=document["weights"]
    )


def mean_over_sampling_steps(plan: Plan, values: Sequence[int]) -> float:
    """Mean over the sampling steps of a value per group, in the groups' order."""
    weighted = zip(plan.groups, values, strict=True)
    total = sum(group.num_sampling_steps * value for group, value in weighted)
    return total / len(plan.sampling_timesteps)

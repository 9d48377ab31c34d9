"""Brings together what the stages left into the results of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import Plan
from tdc_ray.execution.item import ItemResult, load_result
from tdc_ray.execution.timeline import WorkerUsage
from tdc_ray.models.first_stage import first_stage_digest
from tdc_ray.runs.evaluation.evaluate import Score
from tdc_ray.runs.evaluation.features import FeatureSpec
from tdc_ray.runs.pretrained.sources import BASE_FILE
from tdc_ray.runs.results import (
    EvaluationResult,
    GroupResult,
    ModelResult,
    PlanResult,
    PretrainedBaseResult,
    PruneResult,
    Results,
    ReuseResult,
    StageSeconds,
    TimesResult,
)
from tdc_ray.runs.stages.base import BaseResult
from tdc_ray.runs.stages.expert import Expert
from tdc_ray.storage.files import exists, listing, read_json
from tdc_ray.storage.provenance import commit, versions
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What stage 2 and the evaluation came to."""

    plan: Plan
    experts: Sequence[Expert]
    """One per group, in order."""

    times: TimesResult

    base: Score
    tdc: Score
    spec: FeatureSpec
    reference: str
    """What the images were held against, in words."""

    usage: Sequence[WorkerUsage]
    """Of the pool's workers, by phase."""

    has_store: bool
    """Whether results were shared with other runs."""


def collect_results(
    run_dir: RunDir, config: RunConfig, outcome: RunOutcome, seconds: float
) -> Results:
    """Bring together what the stages left.

    Args:
        run_dir: Where the base's result is.
        config: The run's settings.
        outcome: What stage 2 and the evaluation came to.
        seconds: How long this attempt took.
    """
    plan, experts = outcome.plan, outcome.experts
    base = load_result(run_dir.base_result, BaseResult).value
    base_score, tdc_score = outcome.base, outcome.tdc
    num_classes = config.conditioning.num_classes
    given = _given_base(run_dir)
    sampler, spent = config.sampler, [expert.choice.spent for expert in experts]
    first_stage = config.data.first_stage
    rounds = {"none": 0, "offline": config.prune.num_rounds, "llm": config.prune.num_rounds}
    return Results(
        preset=config.preset,
        seed=config.seed,
        dataset=config.data.name,
        metric=outcome.spec.metric,
        base=ModelResult(
            score=base_score.score,
            macs=float(base.macs),
            num_params=float(base.num_params),
            train_steps=base.train_steps,
            train_macs=base.train_macs,
            images_per_second=base_score.images_per_second,
        ),
        tdc=ModelResult(
            score=tdc_score.score,
            macs=mean_over_sampling_steps(plan, [expert.macs for expert in experts]),
            num_params=mean_over_sampling_steps(plan, [expert.num_params for expert in experts]),
            train_steps=base.train_steps + sum(expert.train_steps for expert in experts),
            train_macs=base.train_macs + sum(expert.train_macs for expert in experts),
            images_per_second=tdc_score.images_per_second,
        ),
        plan=PlanResult(
            k=config.plan.min_macs_share,
            num_groups=config.plan.num_groups,
            schedule=config.plan.schedule,
            mean_macs_limit=plan.mean_limit_share * base.macs,
            notes=plan.notes,
        ),
        groups=tuple(_group_result(expert, base.macs) for expert in experts),
        prune=PruneResult(
            method=config.prune.method,
            rounds=rounds.get(config.prune.method, 1),
            candidates=max(
                (e.entry.candidate + 1 for x in experts for e in x.choice.candidates), default=0
            ),
            seconds=sum(part.seconds for part in spent),
            search_macs=sum(part.macs for part in spent),
            prompt_tokens=sum(part.prompt_tokens for part in spent),
            completion_tokens=sum(part.completion_tokens for part in spent),
            proxy_seconds=sum(part.proxy_seconds for part in spent),
            refit=config.prune.refit,
            space=config.prune.space,
            objective=config.prune.objective,
            notes=tuple(note for part in spent for note in part.notes),
        ),
        evaluation=EvaluationResult(
            sampler=sampler.sampler,
            num_inference_steps=sampler.num_inference_steps,
            eta=sampler.eta,
            seed=config.evaluate.seed,
            num_images=config.evaluate.num_images,
            reference=outcome.reference,
            features=outcome.spec.extractor,
            weights="EMA" if given is None else f"{given.weights} (base), EMA (experts)",
            precision=config.evaluate.precision,
            num_classes=num_classes,
            labels=None if num_classes is None else f"image i is of class i mod {num_classes}",
            guidance_scale=sampler.guidance_scale,
            first_stage=None if first_stage is None else first_stage_digest(Path(first_stage)),
        ),
        seconds=StageSeconds(
            base=base.seconds,
            prune=sum(part.seconds for part in spent),
            finetune=sum(expert.seconds for expert in experts),
            evaluate=base_score.seconds + tdc_score.seconds,
            wall=seconds,
        ),
        versions=versions(),
        commit=commit(),
        given_base=given,
        workers=tuple(outcome.usage),
        reuse=_reuse(run_dir) if outcome.has_store else None,
        times=outcome.times,
    )


def item_results(run_dir: RunDir) -> list[ItemResult[dict[str, Any]]]:
    """Load what the items of a finished run left, whatever it is: its base, groups and samples."""
    paths = [run_dir.base_result, *listing(run_dir.root, "groups/*/*.json")]
    paths += listing(run_dir.samples, "**/*.json")
    return [load_result(path, dict[str, Any]) for path in paths]


def _reuse(run_dir: RunDir) -> ReuseResult | None:
    """Count what the results of a run's items say of a store."""
    marked = [(one.cached.reused, one.value) for one in item_results(run_dir) if one.cached]
    if not marked:
        return None

    def macs(name: str, *, reused: bool) -> float:
        """Sum a kind up; a fine-tune's ``macs`` are the expert's, not what it took."""
        return sum(
            float(result.get(name, 0.0))
            for was_reused, result in marked
            if was_reused == reused and (name == "train_macs" or "train_macs" not in result)
        )

    return ReuseResult(
        items_computed=sum(not reused for reused, _ in marked),
        items_reused=sum(reused for reused, _ in marked),
        train_macs_computed=macs("train_macs", reused=False),
        train_macs_reused=macs("train_macs", reused=True),
        search_macs_computed=macs("macs", reused=False),
        search_macs_reused=macs("macs", reused=True),
    )


def _given_base(run_dir: RunDir) -> PretrainedBaseResult | None:
    path = run_dir.base / BASE_FILE
    if not exists(path):
        return None
    document = read_json(path)
    return PretrainedBaseResult(
        **{name: document[name] for name in ("source", "files", "weights")}
    )


def _group_result(expert: Expert, macs_base: int) -> GroupResult:
    limit, nanoseconds = expert.max_nanoseconds, expert.nanoseconds
    return GroupResult(
        index=expert.group.index,
        timesteps=(expert.group.first, expert.group.last),
        macs_limit=expert.max_macs if limit is None else macs_base,
        macs=expert.macs,
        num_params=expert.num_params,
        widths=expert.choice.widths,
        loss_base=expert.choice.loss_base,
        loss_cut=expert.choice.loss_cut,
        loss_refit=expert.choice.loss_refit,
        loss_finetuned=expert.loss_finetuned,
        source="base" if expert.choice.entry is None else expert.choice.entry.source,
        milliseconds_limit=None if limit is None else limit / 1e6,
        milliseconds=None if nanoseconds is None else nanoseconds / 1e6,
    )


def mean_over_sampling_steps(plan: Plan, values: Sequence[int]) -> float:
    """Mean over the sampling steps of a value per group, in the groups' order."""
    weighted = zip(plan.groups, values, strict=True)
    total = sum(group.num_sampling_steps * value for group, value in weighted)
    return total / len(plan.sampling_timesteps)

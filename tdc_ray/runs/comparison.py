"""What TDC is compared with: the base trained on by as many macs, its score and its losses."""

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tdc_ray.config.compare import CompareConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.cache import ResultCache
from tdc_ray.execution.chain import Chain, result_of, results_of
from tdc_ray.execution.item import load_result
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.runs.evaluation.evaluate import Score, evaluate, score, unscored_samples
from tdc_ray.runs.evaluation.features import FeatureSpec
from tdc_ray.runs.evaluation.held_out import (
    loss_chains,
    loss_items,
    losses_path,
    mean_losses,
    score_by_loss,
    swapped_losses,
)
from tdc_ray.runs.results import ComparisonResult, GroupDifference, Results, SwapResult
from tdc_ray.runs.stages.base import last_checkpoint
from tdc_ray.runs.stages.base_result import BaseResult
from tdc_ray.runs.stages.expert import Expert
from tdc_ray.runs.stages.longer_base import (
    LongerBaseJob,
    LongerBaseResult,
    longer_base_item,
    steps_for,
)
from tdc_ray.runs.stages.paired_losses import (
    PairedResult,
    mean_difference,
    paired_difference,
)
from tdc_ray.storage.files import remove
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class LongerBase:
    """The base trained on, and its losses beside TDC's, group by group."""

    trained: LongerBaseResult
    losses: Sequence[PairedResult]


def is_compared(results: Results, compare: CompareConfig) -> bool:
    """Whether results hold the comparison that is asked for."""
    found = results.comparison
    if compare.kind == "none":
        return True
    if found is None or found.kind != compare.kind or (compare.swaps and not found.swaps):
        return False
    return found.num_noised - compare.num_images in range(found.num_images)


def train_and_measure(
    run_dir: RunDir, config: RunConfig, experts: Sequence[Expert], cache: ResultCache | None
) -> Chain[LongerBase]:
    """Train the base on by all that TDC spent beyond stage 1, then measure both models' losses.

    Args:
        run_dir: The run.
        config: Its settings.
        experts: All experts, which say what they took.
        cache: Where a base that another run trained comes from.
    """
    base = load_result(run_dir.base_result, BaseResult).value
    spent = sum(expert.train_macs + expert.search_result.cost.macs for expert in experts)
    steps = steps_for(spent, base.macs, config.base.batch_size)
    job = LongerBaseJob(run_dir, config, steps, last_checkpoint(run_dir, cache))
    trained = yield from result_of(longer_base_item(job))
    remove(job.checkpoint)  # its result exists now
    items = loss_items(run_dir, config, experts, "longer-base", base.macs)
    return LongerBase(trained, (yield from results_of(items)))


def finish_comparison(
    run_dir: RunDir,
    config: RunConfig,
    spec: FeatureSpec | None,
    experts: Sequence[Expert],
    longer: LongerBase,
    pool: Pool,
) -> ComparisonResult:
    """Score the base trained on, and with single experts put in where that is asked for."""
    base = load_result(run_dir.base_result, BaseResult).value
    groups = [expert.group for expert in experts]
    swaps = groups if config.compare.swaps else []
    if spec is None:
        own, others = _losses(run_dir, config, experts, base.macs, pool)
    else:
        own, others = _scores(run_dir, config, spec, swaps, base.macs, pool)
    paths = [losses_path(run_dir, config, group, "longer-base") for group in groups]
    return ComparisonResult(
        kind=config.compare.kind,
        score=own.score,
        metrics=own.metrics,
        train_macs=base.train_macs + longer.trained.macs_spent,
        steps=base.train_steps + longer.trained.steps,
        continued=longer.trained.continued,
        seconds=longer.trained.seconds,
        num_images=longer.losses[0].num_images,
        num_noised=longer.losses[0].num_noised,
        seen_by_base=None if config.model.base else not config.prune.held_out_of_base,
        mean=mean_difference(paths, groups),
        groups=tuple(
            GroupDifference(index=group.index, **asdict(paired_difference(path)))
            for group, path in zip(groups, paths, strict=True)
        ),
        swaps=tuple(
            SwapResult(index=group.index, score=found)
            for group, found in zip(swaps, others, strict=True)
        ),
    )


def _scores(
    run_dir: RunDir,
    config: RunConfig,
    spec: FeatureSpec,
    swaps: Sequence[TimestepGroup],
    macs: float,
    pool: Pool,
) -> tuple[Score, list[float]]:
    """Score images of the base trained on, and of it with each swapped group's expert put in."""
    models = [
        evaluate(run_dir, config, spec, "longer-base", macs, swapped) for swapped in (None, *swaps)
    ]
    shards = pool.run(dict(ChainMap(*map(dict, models))), "comparison")
    first, *swapped_models = ([shards[name] for name in model] for model in models)
    own = score(run_dir, first, spec, config.evaluate.metrics)
    return own, [score(run_dir, model).score for model in swapped_models]


def _losses(
    run_dir: RunDir, config: RunConfig, experts: Sequence[Expert], macs: float, pool: Pool
) -> tuple[Score, list[float]]:
    """Measure the same by losses, where no image is scored; a swap's follows from the others."""
    losses = loss_chains(run_dir, config, experts, "longer-base", macs)
    chains: dict[str, Any] = {**losses}
    chains["samples"] = unscored_samples(run_dir, config, "longer-base", macs)
    done = pool.run(chains, "comparison")
    groups = [expert.group for expert in experts]
    loss = mean_losses(run_dir, config, groups, "longer-base").loss_base
    own = score_by_loss(done["samples"], loss, [done[name] for name in losses])
    return own, swapped_losses(run_dir, config, groups) if config.compare.swaps else []

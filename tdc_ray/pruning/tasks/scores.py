"""The scores of the base's units on a group's timesteps."""

import time
from dataclasses import dataclass

from tdc_ray.config.prune import ScoreMethod
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.item import Inputs, Report, WorkItem
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.criteria.registry import CRITERIA
from tdc_ray.pruning.criteria.scores import ScoreInputs, Scores
from tdc_ray.pruning.fingerprint import group_key
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import load_base
from tdc_ray.seeds import derive_seed

VERSION = 3
"""Changes whenever scores do, so that cached ones are computed again."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Score the base's units on a group's timesteps."""

    context: PruningContext
    group: TimestepGroup
    method: ScoreMethod


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """Scores, and their cost."""

    scores: Scores
    macs: float
    seconds: float


def cache_inputs(job: ScoreJob) -> Inputs:
    """Return the cache inputs of scores."""
    group = {"group": job.group.index} if CRITERIA[job.method].is_seeded else {}
    what = {"stage": "scores", "version": VERSION, "method": job.method}
    return {**what, **group, **group_key(job.context, job.group)}


def score_units(job: ScoreJob, report: Report) -> ScoreResult:
    """Score all units by a criterion."""
    started = time.perf_counter()
    base, group = load_base(job.context, job.group), job.group
    scores, passes = CRITERIA[job.method].score(
        ScoreInputs(
            network=base.network,
            units=base.space.units,
            timesteps=group.timesteps,
            batches=base.batches("scores"),
            num_images=job.context.prune.num_images,
            schedule=base.schedule,
            seed=derive_seed(job.context.seed, job.method, group.index),
        )
    )
    report({}, 1)
    macs = float(passes * base.space.macs_base)
    return ScoreResult(scores, macs, time.perf_counter() - started)


def score_item(
    search: GroupSearch, method: ScoreMethod, name: str
) -> WorkItem[ScoreJob, ScoreResult]:
    """Create the item of some name that scores all units by a criterion."""
    return WorkItem(
        key=search.key(name),
        function=score_units,
        job=ScoreJob(search.context, search.group, method),
        result_path=search.result_path(name),
        result_type=ScoreResult,
        cost=3.0 * search.context.prune.num_images * search.space.macs_base,
        cost_behind=search.cost_behind(),
        inputs=cache_inputs,
    )

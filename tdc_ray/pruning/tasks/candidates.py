"""The losses of a candidate: the base pruned and refitted, on a group's timesteps.

They are measured on the same images, timesteps and noise for every candidate of a group: in a heat
of the race on some that are there for choices, as a finalist on those that are held out.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.item import Inputs, Report, WorkItem
from tdc_ray.models.units import KeptIndices, keep_everything, widths_of
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.fingerprint import group_key
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import (
    ERROR_WEIGHT_PASSES,
    Measured,
    load_base,
    measure,
    save_refit_weights,
)
from tdc_ray.pruning.noised import Purpose

VERSION = 4
"""Changes whenever losses do, so that cached ones are measured again."""


class Heat(NamedTuple):
    """What candidates are measured on; all of a heat on the same."""

    name: str
    purpose: Purpose
    share: float
    """Of the images, and of those that the refit rests on."""


FIRST, SECOND = Heat("first", "choice", 0.25), Heat("second", "choice", 0.5)
WHOLE, FINAL = Heat("whole", "choice", 1.0), Heat("final", "held-out", 1.0)


@dataclass(frozen=True, slots=True)
class CandidateJob:
    """Prune the base, refit the sub-model, and measure the loss on a group's timesteps."""

    context: PruningContext
    group: TimestepGroup
    kept: KeptIndices
    number: int
    """Place in the group's search, from 0, the base; the step of its metrics."""

    saves_weights: bool = False
    """Save the weight of every image in the refits of the group, which follows from the base."""

    heat: Heat = FINAL


@dataclass(frozen=True, slots=True)
class CandidateResult(Measured):
    """Losses, and their cost."""

    seconds: float


def cache_inputs(job: CandidateJob) -> Inputs:
    """Return the cache inputs of losses."""
    what = {
        "kept": job.kept,
        "weights": "of channels too" if job.saves_weights else False,
        "noise": job.heat.purpose,
        "share": job.heat.share,
    }
    return {"stage": "measure", "version": VERSION, **what, **group_key(job.context, job.group)}


def measure_candidate(job: CandidateJob, report: Report) -> CandidateResult:
    """Measure the losses of a sub-model, after pruning and after the refit."""
    started = time.perf_counter()
    base = load_base(job.context, job.group)
    measured = measure(base, job.kept, job.heat.purpose, job.heat.share)
    if job.saves_weights:
        measured = replace(measured, macs=measured.macs + save_refit_weights(base))
    losses = {"loss_cut": measured.loss_cut}
    if measured.loss_refit is not None:
        losses["loss_refit"] = measured.loss_refit
    report(losses, job.number)
    return CandidateResult(**asdict(measured), seconds=time.perf_counter() - started)


def candidate_item(
    search: GroupSearch, name: str, kept: KeptIndices, number: int, heat: Heat = FINAL
) -> WorkItem[CandidateJob, CandidateResult]:
    """Create the item that prunes, refits and measures a sub-model.

    Args:
        search: The group's search.
        name: Its name within the group.
        kept: What of each unit is kept.
        number: Which of the search's candidates it is, counted from 1; 0 means none of them.
        heat: What it is measured on.
    """
    prune, macs = search.context.prune, search.space.macs(widths_of(kept))
    refitted = prune.refit != "none" and macs < search.space.macs_base
    images = heat.share * (prune.num_images + 3 * prune.num_refit_images * refitted)
    name = name if heat == FINAL else f"{name}-{heat.name}"
    return WorkItem(
        key=search.key(name),
        function=measure_candidate,
        job=CandidateJob(search.context, search.group, kept, number, heat=heat),
        result_path=search.result_path(name, kept),
        result_type=CandidateResult,
        cost=float(images * macs),
        cost_behind=search.cost_behind(prune.max_candidates - number),
        num_steps=max(number, 1),
        inputs=cache_inputs,
    )


def base_item(search: GroupSearch) -> WorkItem[CandidateJob, CandidateResult]:
    """Create the item that measures the base and saves the image weights of the group's refits."""
    prune, macs_base = search.context.prune, search.space.macs_base
    item = candidate_item(search, "base", keep_everything(search.space.units), 0)
    is_read = search.max_macs < macs_base or search.context.models_all_groups
    if "none" in (prune.refit, prune.method) or not is_read:
        return item
    weighing = float(ERROR_WEIGHT_PASSES * prune.num_refit_images * macs_base)
    return replace(
        item,
        job=replace(item.job, saves_weights=True),
        cost=item.cost + weighing,
        files=(search.context.run_dir.error_weights(search.group.index),),
    )

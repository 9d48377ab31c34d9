"""The item that models the increase of a group's loss with every cut, without measuring any."""

import time
from dataclasses import dataclass

from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.item import Inputs, Report, WorkItem
from tdc_ray.models.families import steps_of
from tdc_ray.models.macs import macs_polynomials
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.criteria.scores import Scores
from tdc_ray.pruning.fingerprint import group_key
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import LoadedBase, load_base, refit_weights
from tdc_ray.pruning.quadratic_model import QuadraticModel
from tdc_ray.pruning.second_order import quadratic_model
from tdc_ray.pruning.sensitivity import Solutions, solve_units

VERSION = 2
"""Changes whenever the model does, so that cached ones are made again."""


@dataclass(frozen=True, slots=True)
class SecondOrderJob:
    """Model the increase of the loss on a group's timesteps with cuts of the base."""

    context: PruningContext
    group: TimestepGroup


@dataclass(frozen=True, slots=True)
class SecondOrderResult:
    """The model, what it took, and the scores by which units are cut in it."""

    scores: Scores
    model: QuadraticModel
    macs: float
    seconds: float


def cache_inputs(job: SecondOrderJob) -> Inputs:
    """Return what a model follows from."""
    prune = job.context.prune
    return {
        "stage": "second-order",
        "version": VERSION,
        "levels": (prune.num_levels, prune.channel_multiple),
        "probes": prune.num_probes,
        **group_key(job.context, job.group),
    }


def model_loss(job: SecondOrderJob, report: Report) -> SecondOrderResult:
    """Solve for the weights behind every unit at every level, and model what all cuts do."""
    started, prune = time.perf_counter(), job.context.prune
    base = load_base(job.context, job.group)
    units, batches = base.space.units, list(base.batches("refit"))
    weights, macs = refit_weights(base, base.whole, batches)
    scores, solutions, solving = solve_units(
        base.network, units, {}, batches, base.schedule, weights, prune.num_levels
    )
    probed = list(base.batches("scores"))
    model = quadratic_model(base.network, solutions, probed, base.schedule, prune.num_probes)
    macs += solving + prune.num_refit_images * base.space.macs_base
    macs += prune.num_images * _probing_macs(base, solutions)
    report({}, 1)
    return SecondOrderResult(scores, model, macs, time.perf_counter() - started)


def second_order_item(search: GroupSearch) -> WorkItem[SecondOrderJob, SecondOrderResult]:
    """Make the item that models the loss of a group."""
    prune = search.context.prune
    passes = 3 * prune.num_refit_images + (1 + prune.num_probes) * prune.num_images
    return WorkItem(
        key=search.key("second-order"),
        function=model_loss,
        job=SecondOrderJob(search.context, search.group),
        result_path=search.result_path("second-order"),
        result_type=SecondOrderResult,
        cost=float(passes * search.space.macs_base),
        cost_behind=search.cost_behind(prune.max_candidates),
        inputs=cache_inputs,
    )


def _probing_macs(base: LoadedBase, solutions: Solutions) -> int:
    """Count the macs per image of the passes, and of the layers behind the units, once per cut."""
    macs = {}
    for layer in base.layers:
        _, polynomial = macs_polynomials([layer], base.space.units)
        macs[layer.name] = polynomial.total(base.space.full)
    changes = sum(
        len(solutions[step.name]) * macs[f"{step.name}.{layer}"]
        for step in steps_of(base.network)
        if step.name in solutions
        for layer in step.output_layers.values()
    )
    return (1 + base.context.prune.num_probes) * base.space.macs_base + changes

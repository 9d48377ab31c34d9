"""Sensitivities: the increase of a model's loss when one of its units is pruned further."""

import time
from dataclasses import dataclass, replace

from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.item import Inputs, Report, WorkItem
from tdc_ray.models.macs import macs_polynomials
from tdc_ray.models.units import KeptIndices, widths_of
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.criteria.scores import Scores, select_top
from tdc_ray.pruning.fingerprint import group_key
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import (
    LoadedBase,
    load_base,
    measure,
    prune_and_refit,
    refit_weights,
)
from tdc_ray.pruning.sensitivity import (
    Solutions,
    levels,
    masked_units,
    measure_units,
    solve_units,
)
from tdc_ray.pruning.space import Scheme

VERSION = 5
"""Changes whenever sensitivities do, so that cached ones are measured again."""

NUM_SHARES = 4
"""Items that the sensitivities of the base's inner units are split into, for several workers."""

Increases = dict[str, dict[int, float]]
"""Increase of the loss, for every unit, by its width."""


@dataclass(frozen=True, slots=True)
class SensitivityJob:
    """Measure the sensitivities of inner units."""

    context: PruningContext
    group: TimestepGroup
    units: tuple[str, ...]
    kept: KeptIndices
    """What the measured model keeps of the base: the best by score."""

    scores: Scores
    """Scores of the base's units; those without are ranked by reconstruction, on this model."""


@dataclass(frozen=True, slots=True)
class StreamJob:
    """Measure the sensitivities of one unit of the stream, or one that was traced.

    Its every width is a candidate.
    """

    context: PruningContext
    group: TimestepGroup
    unit: str
    kept: KeptIndices
    scores: Scores
    loss: float
    """Loss of the measured model on the same images and noise."""


@dataclass(frozen=True, slots=True)
class StreamResult:
    """Sensitivities, and their cost."""

    sensitivities: Increases
    macs: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SensitivityResult:
    """Sensitivities, their cost, and the scores by which the units were pruned."""

    scores: Scores
    sensitivities: Increases
    macs: float
    seconds: float


SensitivityItem = WorkItem[SensitivityJob, SensitivityResult] | WorkItem[StreamJob, StreamResult]


def cache_inputs(job: SensitivityJob | StreamJob) -> Inputs:
    """Return the cache inputs of sensitivities."""
    what: Inputs = (
        {"stage": "stream", "unit": job.unit, "loss": job.loss}
        if isinstance(job, StreamJob)
        else {"stage": "sensitivities", "units": job.units}
    )
    prune = job.context.prune
    return {
        **what,
        "version": VERSION,
        "levels": (prune.num_levels, prune.channel_multiple),
        "kept": job.kept,
        "scores": job.scores,
        **group_key(job.context, job.group),
    }


def measure_sensitivities(job: SensitivityJob, report: Report) -> SensitivityResult:
    """Measure the increase of the loss at every unit's widths, all in one pass."""
    started, prune = time.perf_counter(), job.context.prune
    base = load_base(job.context, job.group)
    model = prune_and_refit(base, job.kept)
    macs, widths = model.macs_spent, widths_of(job.kept)
    units = [
        replace(unit, width=widths[unit.name])
        for unit in base.space.units
        if unit.name in job.units
    ]
    scores = {
        unit.name: [job.scores[unit.name][step] for step in job.kept[unit.name]]
        for unit in units
        if unit.name in job.scores
    }
    if prune.refit == "none":
        solutions = masked_units(model.network, units, scores, prune.num_levels)
    else:
        batches = list(base.batches("refit"))
        weights, weighing = refit_weights(base, model, batches)
        scores, solutions, solving = solve_units(
            model.network, units, scores, batches, base.schedule, weights, prune.num_levels
        )
        macs += weighing + solving + prune.num_refit_images * base.space.macs(widths)
    images = list(base.batches("choice"))
    increases = measure_units(model.network, solutions, images, base.schedule, prune.precision)
    macs += _measuring_macs(base, widths, solutions) * prune.num_images
    report({}, 1)
    return SensitivityResult(scores, increases, macs, time.perf_counter() - started)


def measure_stream(job: StreamJob, report: Report) -> StreamResult:
    """Measure the increase of the loss at a stream's widths."""
    started = time.perf_counter()
    base = load_base(job.context, job.group)
    (unit,) = (unit for unit in base.space.units if unit.name == job.unit)
    increases, macs = {}, 0.0
    narrowed = replace(unit, width=len(job.kept[unit.name]))
    for width in levels(narrowed, job.context.prune.num_levels):
        kept = {**job.kept, **select_top((unit,), job.scores, {unit.name: width})}
        measured = measure(base, kept, "choice")
        increases[width] = measured.loss - job.loss
        macs += measured.macs
    report({}, 1)
    return StreamResult({unit.name: increases}, macs, time.perf_counter() - started)


def sensitivity_items(
    search: GroupSearch,
    number: int,
    kept: KeptIndices,
    scores: Scores,
    loss: float,
    num_shares: int,
) -> list[SensitivityItem]:
    """Create a pass's items: inner units in several shares, and every stream by itself.

    Args:
        search: The group's search.
        number: The pass.
        kept: What the measured model keeps of the base.
        scores: Scores of the base's units.
        loss: Loss of that model.
        num_shares: Items for the inner units; each runs the images through the whole model.
    """
    prune, of_group = search.context.prune, (search.context, search.group)
    units = [unit for unit in search.space.units if len(kept[unit.name]) > unit.least]
    inner = [unit.name for unit in units if unit.has_step]
    streams = [unit.name for unit in units if not unit.has_step]
    macs, refitting = search.space.macs(widths_of(kept)), 3 * prune.num_refit_images
    behind = search.cost_behind(prune.max_candidates)
    items: list[SensitivityItem] = []
    for share in range(num_shares):
        if names := tuple(inner[share::num_shares]):
            name, measuring = f"sensitivities-{number}-{share}", len(names) * prune.num_levels
            items.append(
                WorkItem(
                    key=search.key(name),
                    function=measure_sensitivities,
                    job=SensitivityJob(*of_group, names, kept, scores),
                    result_path=search.result_path(name),
                    result_type=SensitivityResult,
                    cost=(refitting + measuring * prune.num_images / 2) * macs,
                    cost_behind=behind,
                    inputs=cache_inputs,
                )
            )
    for index, stream in enumerate(streams):
        name = f"sensitivities-{number}-stream-{index}"
        items.append(
            WorkItem(
                key=search.key(name),
                function=measure_stream,
                job=StreamJob(*of_group, stream, kept, scores, loss),
                result_path=search.result_path(name),
                result_type=StreamResult,
                cost=prune.num_levels * (prune.num_images + refitting) * macs,
                cost_behind=behind,
                inputs=cache_inputs,
            )
        )
    return items


def _measuring_macs(base: LoadedBase, widths: Scheme, solutions: Solutions) -> float:
    """Count the macs per image of all steps after each unit, once for each of its levels."""
    behind, total = dict[str, int](), 0
    for layer in reversed(base.layers):
        _, macs = macs_polynomials([layer], base.space.units)
        total += macs.total(widths)
        for name in solutions:
            if layer.name.startswith(f"{name}."):
                behind[name] = total  # in the end, where the block begins
    return float(sum(behind[name] * len(by_width) for name, by_width in solutions.items()))

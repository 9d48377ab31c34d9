"""Work on one group's timesteps: scores, sensitivities, and the loss of a pruned model.

Losses are measured on the same images, timesteps and noise for every candidate of a group; no
fine-tune sees those images.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffusers import UNet2DModel

from tdc_ray.config import RunConfig
from tdc_ray.device import worker_device
from tdc_ray.diffusion import noise_schedule
from tdc_ray.inputs import of_group, of_measuring, of_run, of_weights
from tdc_ray.layout import RunDir
from tdc_ray.models.layers import all_layers
from tdc_ray.models.shapes import Layer
from tdc_ray.models.surgery import cut, kept_outputs
from tdc_ray.models.unet import load_unet, unet_config
from tdc_ray.models.units import Kept, Unit, keep_all, widths_of
from tdc_ray.plan import Group
from tdc_ray.prune.importance import (
    Scores,
    diff_pruning_scores,
    keep_best,
    magnitude_scores,
    random_scores,
    taylor_scores,
)
from tdc_ray.prune.noised import NoisedBatch, held_out_loss, noised_batches
from tdc_ray.prune.refit import refit
from tdc_ray.prune.sensitivity import (
    Solutions,
    levels,
    masked_units,
    measure_units,
    solve_units,
)
from tdc_ray.prune.space import Scheme, Space, space_of
from tdc_ray.prune.table import tabulate
from tdc_ray.prune_settings import ScoreMethod
from tdc_ray.seeds import derive_seed
from tdc_ray.work import Inputs, Report, Result

ERROR_WEIGHT_PASSES = 3
"""What the weights of the refit's images cost, in forward passes: one forward and one backward."""

VERSION = 1
"""Changes whenever scores, sensitivities or losses do, so that stored ones are made again."""

DIFF_PRUNING_BATCH = 32
"""Images of Diff-Pruning's one batch, at most; it goes through the network at every timestep."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Score the base's units on a group's timesteps."""

    run_dir: RunDir
    config: RunConfig
    group: Group
    method: ScoreMethod


@dataclass(frozen=True, slots=True)
class SensitivityJob:
    """Measure how the loss of the base, or of a cut of it, grows when one unit is cut further."""

    run_dir: RunDir
    config: RunConfig
    group: Group
    units: tuple[str, ...]
    """Inner units."""

    kept: Kept
    """What the model that is measured keeps of the base: the best by score."""

    scores: Scores
    """Of the base's units; those that have none are ranked by reconstruction, on this model."""


@dataclass(frozen=True, slots=True)
class StreamJob:
    """The same for one unit of the stream, whose every width is a candidate of its own."""

    run_dir: RunDir
    config: RunConfig
    group: Group
    unit: str
    kept: Kept
    scores: Scores
    loss: float
    """Of the model that is measured, on the group's held-out images."""


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """Cut the base, refit what is left, and measure the loss on a group's timesteps."""

    run_dir: RunDir
    config: RunConfig
    group: Group
    kept: Kept
    number: int
    """Place in the group's search, from 0: the base; the step of its metrics."""


def score_inputs(job: ScoreJob) -> Inputs:
    """Give what :func:`score_units` follows from."""
    place = {"group": job.group.index} if job.method == "random" else {}
    return {"stage": "scores", "method": job.method, **place, **_inputs(job)}


def sensitivity_inputs(job: SensitivityJob) -> Inputs:
    """Give what :func:`measure_sensitivities` follows from."""
    levels = job.config.prune.num_levels
    what = {"units": job.units, "levels": levels, "kept": job.kept, "scores": job.scores}
    return {"stage": "sensitivities", **what, **_inputs(job)}


def stream_inputs(job: StreamJob) -> Inputs:
    """Give what :func:`measure_stream` follows from."""
    levels = job.config.prune.num_levels
    what = {"unit": job.unit, "levels": levels, "kept": job.kept, "scores": job.scores}
    return {"stage": "stream", "loss": job.loss, **what, **_inputs(job)}


def measure_inputs(job: MeasureJob) -> Inputs:
    """Give what :func:`measure_candidate` follows from."""
    return {"stage": "measure", "kept": job.kept, **_inputs(job)}


def _inputs(job: ScoreJob | SensitivityJob | StreamJob | MeasureJob) -> Inputs:
    return {
        "version": VERSION,
        "base": of_weights(job.run_dir.base_unet),
        **of_run(job.config),
        **of_group(job.group),
        **of_measuring(job.config.prune),
    }


@dataclass(frozen=True, slots=True)
class Base:
    """The base on the worker's device, and what can be cut of it."""

    unet: UNet2DModel
    space: Space
    layers: Sequence[Layer]
    """In the order of the forward pass."""


def load_base(run_dir: RunDir, config: RunConfig) -> Base:
    """Load a run's base.

    Raises:
        CheckpointError: It is missing or malformed.
    """
    unet_settings = unet_config(run_dir.base_unet)
    return Base(
        load_unet(run_dir.base_unet).to(worker_device()),
        space_of(unet_settings, config.prune.space),
        all_layers(unet_settings),
    )


def score_units(job: ScoreJob, report: Report) -> Result:
    """Give ``scores`` (a list per unit), ``macs`` that it took, and ``seconds``."""
    started = time.perf_counter()
    config = job.config
    base = load_base(job.run_dir, config)
    scores, macs = _scores(job.method, base, base.space.units, config, job.group)
    report({}, 1)
    return {"scores": scores, "macs": macs, "seconds": time.perf_counter() - started}


def measure_sensitivities(job: SensitivityJob, report: Report) -> Result:
    """Give ``scores``, ``sensitivities``, ``macs`` and ``seconds`` for some inner units.

    Sensitivities are the growth of the loss, for every unit, by width (as text, being JSON).
    """
    started = time.perf_counter()
    config, group, prune = job.config, job.group, job.config.prune
    base = load_base(job.run_dir, config)
    device, schedule = base.unet.device, noise_schedule(config.diffusion).to(base.unet.device)
    unet, macs = _cut_and_refit(base, job.kept, config, group)
    widths = widths_of(job.kept)
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
        solutions = masked_units(unet, units, scores, prune.num_levels)
    else:
        seen = list(noised_batches(config, group, device, purpose="refit"))
        scores, solutions = solve_units(unet, units, scores, seen, schedule, prune.num_levels)
        macs += prune.num_refit_images * (1 + ERROR_WEIGHT_PASSES) * base.space.macs(widths)
    held_out = list(noised_batches(config, group, device, purpose="held-out"))
    grown = measure_units(unet, solutions, held_out, schedule)
    macs += _measuring_macs(base, widths, solutions) * prune.num_images
    report({}, 1)
    return {
        "scores": scores,
        "sensitivities": grown,
        "macs": macs,
        "seconds": time.perf_counter() - started,
    }


def measure_stream(job: StreamJob, report: Report) -> Result:
    """Give ``sensitivities``, as :func:`measure_sensitivities` does, ``macs`` and ``seconds``."""
    started = time.perf_counter()
    base = load_base(job.run_dir, job.config)
    (unit,) = (unit for unit in base.space.units if unit.name == job.unit)
    grown, macs = {}, 0.0
    for width in levels(
        replace(unit, width=len(job.kept[unit.name])), job.config.prune.num_levels
    ):
        kept = {**job.kept, **keep_best((unit,), job.scores, {unit.name: width})}
        _, loss, spent = _cut_and_measure(base, kept, job.config, job.group)
        grown[width] = loss - job.loss
        macs += spent
    report({}, 1)
    seconds = time.perf_counter() - started
    return {"sensitivities": {unit.name: grown}, "macs": macs, "seconds": seconds}


def measure_candidate(job: MeasureJob, report: Report) -> Result:
    """Give ``loss_cut`` and ``loss_refit`` of what is kept of the base, ``macs`` and ``seconds``.

    ``loss_refit`` is None where there is no refit; where nothing is cut both are the base's.
    """
    started = time.perf_counter()
    base = load_base(job.run_dir, job.config)
    loss_cut, loss, macs = _cut_and_measure(base, job.kept, job.config, job.group)
    loss_refit = None if job.config.prune.refit == "none" else loss
    report({"loss_cut": loss_cut, "loss_refit": loss}, job.number)
    return {
        "loss_cut": loss_cut,
        "loss_refit": loss_refit,
        "macs": macs,
        "seconds": time.perf_counter() - started,
    }


def pruned_unet(base: Base, kept: Kept, config: RunConfig, group: Group) -> UNet2DModel:
    """Cut the base and, as the settings say, refit what is left on the group's timesteps."""
    return _cut_and_refit(base, kept, config, group)[0]


def _cut_and_refit(
    base: Base, kept: Kept, config: RunConfig, group: Group
) -> tuple[UNet2DModel, float]:
    """Give the cut model and the macs that its refit took."""
    pruned = cut(base.unet, base.space.units, kept)
    if config.prune.refit == "none":
        return pruned, 0.0
    return pruned, _refit(base, pruned, kept, config, group)


def _refit(base: Base, pruned: UNet2DModel, kept: Kept, config: RunConfig, group: Group) -> float:
    """Refit in place, unless nothing is cut; give the macs that it took."""
    units = base.space.units
    if kept == keep_all(units):
        return 0.0
    schedule = noise_schedule(config.diffusion).to(base.unet.device)
    batches = noised_batches(config, group, base.unet.device, purpose="refit")
    outputs = kept_outputs(base.unet, units, kept)
    macs = refit(base.unet, pruned, outputs, batches, schedule)
    passes = (1 + ERROR_WEIGHT_PASSES) * base.space.macs_base
    passes += 2 * base.space.macs(widths_of(kept))
    return macs + float(config.prune.num_refit_images * passes)


def _cut_and_measure(
    base: Base, kept: Kept, config: RunConfig, group: Group
) -> tuple[float, float, float]:
    """Give the loss after the cut, the loss after the refit if there is one, and the macs."""
    pruned = cut(base.unet, base.space.units, kept)
    measuring = float(config.prune.num_images * base.space.macs(widths_of(kept)))
    loss_cut = held_out_loss(pruned, config, group)
    if config.prune.refit == "none" or kept == keep_all(base.space.units):
        return loss_cut, loss_cut, measuring
    macs = _refit(base, pruned, kept, config, group)
    return loss_cut, held_out_loss(pruned, config, group), macs + 2 * measuring


def _scores(
    method: ScoreMethod,
    base: Base,
    units: tuple[Unit, ...],
    config: RunConfig,
    group: Group,
) -> tuple[Scores, float]:
    """Give the scores by a method, and the macs that they took."""
    unet, forward = base.unet, float(base.space.macs_base)
    if method == "random":
        return random_scores(units, derive_seed(config.seed, "random", group.index)), 0.0
    if method == "magnitude":
        return magnitude_scores(unet, units), 0.0
    schedule = noise_schedule(config.diffusion).to(unet.device)
    batches = noised_batches(config, group, unet.device, purpose="scores")
    if method == "taylor":
        return taylor_scores(unet, units, batches, schedule), 3 * forward * config.prune.num_images
    first = next(batches)
    size = min(DIFF_PRUNING_BATCH, len(first.x_0))
    parts = (first.x_0, first.epsilon, first.timesteps, first.labels)
    batch = NoisedBatch(*(part[:size] for part in parts))
    scores, seen = diff_pruning_scores(unet, units, batch, group.timesteps, schedule)
    return scores, 3 * forward * size * seen


def _measuring_macs(base: Base, widths: Scheme, solutions: Solutions) -> float:
    """Macs per image of measuring units: of all that stands behind each, once for each level."""
    behind, total = 0, 0
    for layer in reversed(base.layers):
        _, macs = tabulate([layer], base.space.units)
        behind += macs.at(widths)
        block, _, last = layer.name.rpartition(".")
        if block in solutions and last in ("conv1", "to_q"):  # where the block begins
            total += behind * len(solutions[block])
    return float(total)

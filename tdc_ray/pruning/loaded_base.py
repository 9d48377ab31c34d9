"""Work on one group's timesteps: scores, sensitivities, and the loss of a pruned model.

Losses are measured on the same images, timesteps and noise for every candidate of a group; no
fine-tune sees those images.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffusers import UNet2DModel

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Report, Result
from tdc_ray.models.layer import Layer
from tdc_ray.models.macs import macs_polynomials
from tdc_ray.models.step import num_untouched
from tdc_ray.models.unet2d.layers import all_layers
from tdc_ray.models.unet2d.steps import steps
from tdc_ray.models.unet2d.surgery import cut, kept_outputs
from tdc_ray.models.unet2d.unet import load_unet, unet_config
from tdc_ray.models.units import KeptIndices, keep_everything, widths_of
from tdc_ray.pruning.criteria.registry import CRITERIA
from tdc_ray.pruning.criteria.scores import ScoreInputs, select_top
from tdc_ray.pruning.jobs import MeasureJob, ScoreJob, SensitivityJob, StreamJob
from tdc_ray.pruning.noised import (
    held_out_losses,
    noised_batches,
)
from tdc_ray.pruning.refit.error_weights import (
    ErrorWeights,
    error_weights,
    load_weights,
    save_weights,
)
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.sensitivity import (
    Solutions,
    levels,
    masked_units,
    measure_units,
    solve_units,
)
from tdc_ray.pruning.space import Scheme, Space, space_of
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import exists
from tdc_ray.storage.run_dir import RunDir

ERROR_WEIGHT_PASSES = 3
"""What the weights of the refit's images cost, in forward passes: one forward and one backward."""


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """The base on the worker's device, and what can be cut of it."""

    run_dir: RunDir
    unet: UNet2DModel
    space: Space
    layers: Sequence[Layer]
    """In the order of the forward pass."""


def load_base(run_dir: RunDir, config: RunConfig) -> LoadedBase:
    """Load a run's base.

    Raises:
        CheckpointError: It is missing or malformed.
    """
    unet_settings = unet_config(run_dir.base_unet)
    return LoadedBase(
        run_dir,
        load_unet(run_dir.base_unet).to(worker_device()),
        space_of(unet_settings, config.prune.space, config.prune.channel_multiple),
        all_layers(unet_settings),
    )


def score_units(job: ScoreJob, report: Report) -> Result:
    """Give ``scores`` (a list per unit), ``macs`` that it took, and ``seconds``."""
    started = time.perf_counter()
    config, group = job.config, job.group
    base = load_base(job.run_dir, config)
    scores, passes = CRITERIA[job.method].score(
        ScoreInputs(
            unet=base.unet,
            units=base.space.units,
            timesteps=group.timesteps,
            batches=noised_batches(config, group, base.unet, purpose="scores"),
            num_images=config.prune.num_images,
            schedule=noise_schedule(config.diffusion).to(base.unet.device),
            seed=derive_seed(config.seed, job.method, group.index),
        )
    )
    report({}, 1)
    macs = float(passes * base.space.macs_base)
    return {"scores": scores, "macs": macs, "seconds": time.perf_counter() - started}


def measure_sensitivities(job: SensitivityJob, report: Report) -> Result:
    """Give ``scores``, ``sensitivities``, ``macs`` and ``seconds`` for some inner units.

    Sensitivities are the growth of the loss, for every unit, by width (as text, being JSON).
    """
    started = time.perf_counter()
    config, group, prune = job.config, job.group, job.config.prune
    base = load_base(job.run_dir, config)
    schedule = noise_schedule(config.diffusion).to(base.unet.device)
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
        seen = list(noised_batches(config, group, base.unet, purpose="refit"))
        weights, spent = _error_weights(base, unet, job.kept, config, group, seen)
        scores, solutions, solving = solve_units(
            unet, units, scores, seen, schedule, weights, prune.num_levels
        )
        macs += spent + solving + prune.num_refit_images * base.space.macs(widths)
    held_out = list(noised_batches(config, group, base.unet, purpose="held-out"))
    grown = measure_units(unet, solutions, held_out, schedule, prune.precision)
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
        kept = {**job.kept, **select_top((unit,), job.scores, {unit.name: width})}
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
    if job.leaves_weights:
        macs += _leave_error_weights(base, job.config, job.group)
    loss_refit = None if job.config.prune.refit == "none" else loss
    report({"loss_cut": loss_cut, "loss_refit": loss}, job.number)
    return {
        "loss_cut": loss_cut,
        "loss_refit": loss_refit,
        "macs": macs,
        "seconds": time.perf_counter() - started,
    }


def pruned_unet(
    base: LoadedBase, kept: KeptIndices, config: RunConfig, group: TimestepGroup
) -> UNet2DModel:
    """Cut the base and, as the settings say, refit what is left on the group's timesteps."""
    return _cut_and_refit(base, kept, config, group)[0]


def _cut_and_refit(
    base: LoadedBase, kept: KeptIndices, config: RunConfig, group: TimestepGroup
) -> tuple[UNet2DModel, float]:
    """Give the cut model and the macs that its refit took."""
    pruned = cut(base.unet, base.space.units, kept)
    if config.prune.refit == "none":
        return pruned, 0.0
    return pruned, _refit(base, pruned, kept, config, group)


def _refit(
    base: LoadedBase,
    pruned: UNet2DModel,
    kept: KeptIndices,
    config: RunConfig,
    group: TimestepGroup,
) -> float:
    """Refit in place, unless nothing is cut; give the macs that it took."""
    units = base.space.units
    if kept == keep_everything(units):
        return 0.0
    schedule = noise_schedule(config.diffusion).to(base.unet.device)
    batches = list(noised_batches(config, group, base.unet, purpose="refit"))
    weights, spent = _error_weights(
        base, base.unet, keep_everything(units), config, group, batches
    )
    outputs = kept_outputs(base.unet, units, kept)
    macs = refit(base.unet, pruned, outputs, batches, schedule, weights)
    passes = base.space.macs_base + 2 * base.space.macs(widths_of(kept))
    return macs + spent + float(config.prune.num_refit_images * passes)


def _error_weights(
    base: LoadedBase,
    unet: UNet2DModel,
    kept: KeptIndices,
    config: RunConfig,
    group: TimestepGroup,
    batches: Sequence[NoisedBatch],
) -> tuple[ErrorWeights, float]:
    """Give how much every image counts, and the macs that it took to know.

    The base's weights are those that its own measurement left, where it did.

    Args:
        base: The base.
        unet: The model that is changed next: the base itself, or a cut of it.
        kept: What it keeps of the base.
        config: The settings.
        group: The group.
        batches: The refit's images.
    """
    path = base.run_dir.error_weights(group.index)
    if kept == keep_everything(base.space.units) and exists(path):
        return load_weights(path, batches, unet.device), 0.0
    weights = error_weights(unet, batches, noise_schedule(config.diffusion).to(unet.device))
    return weights, _weighing_macs(base, kept, config)


def _leave_error_weights(base: LoadedBase, config: RunConfig, group: TimestepGroup) -> float:
    """Keep how much every image counts in the group's refits; give the macs that it took."""
    batches = list(noised_batches(config, group, base.unet, purpose="refit"))
    schedule = noise_schedule(config.diffusion).to(base.unet.device)
    weights = error_weights(base.unet, batches, schedule)
    save_weights(base.run_dir.error_weights(group.index), weights)
    return _weighing_macs(base, keep_everything(base.space.units), config)


def _weighing_macs(base: LoadedBase, kept: KeptIndices, config: RunConfig) -> float:
    passes = ERROR_WEIGHT_PASSES * config.prune.num_refit_images
    return float(passes * base.space.macs(widths_of(kept)))


def _cut_and_measure(
    base: LoadedBase, kept: KeptIndices, config: RunConfig, group: TimestepGroup
) -> tuple[float, float, float]:
    """Give the loss after the cut, the loss after the refit if there is one, and the macs."""
    pruned, macs = _cut_and_refit(base, kept, config, group)
    models = [pruned]
    if macs:
        models.append(cut(base.unet, base.space.units, kept))
    losses = held_out_losses(base.unet, models, config, group)
    each = len(models) * base.space.macs(widths_of(kept))
    each -= (len(models) - 1) * _macs_before(base, pruned)
    return losses[-1], losses[0], macs + float(config.prune.num_images * each)


def _macs_before(base: LoadedBase, pruned: UNet2DModel) -> int:
    """Count the macs of an image before the first cut."""
    own, found = steps(base.unet), steps(pruned)
    names = tuple(f"{step.name}." for step in own[num_untouched(own, found) :])
    layers = itertools.takewhile(lambda layer: not f"{layer.name}.".startswith(names), base.layers)
    _, macs = macs_polynomials(list(layers), base.space.units)
    return macs.at(base.space.full)


def _measuring_macs(base: LoadedBase, widths: Scheme, solutions: Solutions) -> float:
    """Macs per image of measuring units: of all that stands behind each, once for each level."""
    behind, total = 0, 0
    for layer in reversed(base.layers):
        _, macs = macs_polynomials([layer], base.space.units)
        behind += macs.at(widths)
        block, _, last = layer.name.rpartition(".")
        if block in solutions and last in ("conv1", "to_q"):  # where the block begins
            total += behind * len(solutions[block])
    return float(total)

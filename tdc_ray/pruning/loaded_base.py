"""The base on a worker, for the timesteps of one group: load, prune and refit, measure."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule, noise_schedule
from tdc_ray.execution.device import worker_device
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import family_of, load_config, load_network, steps_of
from tdc_ray.models.layer import Layer
from tdc_ray.models.macs import macs_polynomials
from tdc_ray.models.step import num_untouched
from tdc_ray.models.structure import network_structure
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.models.units import KeptIndices, keep_everything, widths_of
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.noised import Purpose, noised_batches, run_all
from tdc_ray.pruning.ranked import Ranked
from tdc_ray.pruning.refit.error_weights import (
    ErrorWeights,
    error_weights,
    load_weights,
    save_weights,
)
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.space import Space, space_of
from tdc_ray.storage.files import exists

ERROR_WEIGHT_PASSES = 2
"""Cost of the image weights of a refit, in forward passes: one forward, and one backward to
activations alone, which takes half of one that reaches the weights too."""


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """The base on the worker's device, and its units."""

    context: PruningContext
    group: TimestepGroup
    network: Denoiser
    space: Space
    layers: Sequence[Layer]
    """In the order of the forward pass."""

    schedule: NoiseSchedule
    """On the device."""

    @property
    def whole(self) -> "PrunedModel":
        """The base as a sub-model of which nothing is pruned."""
        return PrunedModel(self.network, keep_everything(self.space.units), 0.0)

    def batches(self, purpose: Purpose, share: float = 1.0) -> Iterator[NoisedBatch]:
        """Yield the group's noised images; see :func:`noised_batches`."""
        return noised_batches(self.context, self.group, self.network, purpose=purpose, share=share)


@dataclass(frozen=True, slots=True)
class PrunedModel:
    """The sub-model after pruning and refit."""

    network: Denoiser
    kept: KeptIndices
    macs_spent: float
    """Macs of the refit; 0 without one."""


@dataclass(frozen=True, slots=True)
class Measured(Ranked):
    """A pruned model's losses on held-out images and noise of the group's timesteps."""

    loss_cut: float
    loss_refit: float | None
    """None without a refit; where nothing is pruned both are the base's."""

    macs: float
    """Cost of refit and measurement."""

    num_images: int | None = field(default=None, kw_only=True)
    """Images that the losses are means over; None in results of 0.1.0."""

    standard_error: float | None = field(default=None, kw_only=True)
    """Of the increase of the loss over the base's on the same images and noise; None for a single
    image and in results of 0.1.0."""

    loss_base: float | None = field(default=None, kw_only=True)
    """The base's loss on the same images and noise; None in results of 0.1.0."""

    distance: float | None = field(default=None, kw_only=True)
    """Mean square of how far the prediction is from the base's; None in results of 0.1.0."""

    distance_error: float | None = field(default=None, kw_only=True)
    """Standard error of the distance; None for a single image and where it was not kept yet."""


def load_base(context: PruningContext, group: TimestepGroup) -> LoadedBase:
    """Load the base of a run.

    Raises:
        CheckpointError: It is missing or malformed.
    """
    folder, prune, device = context.run_dir.base_unet, context.prune, worker_device()
    config = load_config(folder)
    return LoadedBase(
        context,
        group,
        load_network(folder).to(device),
        space_of(config, prune.space, prune.channel_multiple),
        network_structure(config).layers,
        noise_schedule(context.diffusion).to(device),
    )


def prune_and_refit(base: LoadedBase, kept: KeptIndices, share: float = 1.0) -> PrunedModel:
    """Prune the base and, as the settings say, refit the sub-model on the group's timesteps.

    Args:
        base: The base.
        kept: What of each unit is kept.
        share: Share of the refit's images to use.
    """
    network, space = base.network, base.space
    pruned = family_of(network).cut(network, space.units, kept)
    if base.context.prune.refit == "none" or kept == base.whole.kept:
        return PrunedModel(pruned, kept, 0.0)
    batches = list(base.batches("refit", share))
    weights, weighing = refit_weights(base, base.whole, batches)
    outputs = kept_outputs(network, space.units, kept)
    macs = refit(network, pruned, outputs, batches, base.schedule, weights)
    passes = space.macs_base + 2 * space.macs(widths_of(kept))
    spent = macs + weighing + float(_count(batches) * passes)
    return PrunedModel(pruned, kept, spent)


def refit_weights(
    base: LoadedBase, model: PrunedModel, batches: Sequence[NoisedBatch]
) -> tuple[ErrorWeights, float]:
    """Return the weights of errors in a refit, and the macs of computing them.

    Those of the base are read from the file that its measurement wrote.

    Args:
        base: The base.
        model: The one that is changed next: the whole base, or a pruned one.
        batches: The refit's images.
    """
    path = base.context.run_dir.error_weights(base.group.index)
    if model.kept == base.whole.kept and exists(path):
        weights = load_weights(path, batches, base.network.device)
        if weights.channels:  # files of 0.1.0 have none
            return weights, 0.0
    return _weigh(base, model, batches)


def save_refit_weights(base: LoadedBase) -> float:
    """Save the weights of errors in the group's refits; return the macs of computing them."""
    weights, macs = _weigh(base, base.whole, list(base.batches("refit")))
    save_weights(base.context.run_dir.error_weights(base.group.index), weights)
    return macs


def _weigh(
    base: LoadedBase, model: PrunedModel, batches: Sequence[NoisedBatch]
) -> tuple[ErrorWeights, float]:
    units = [unit.name for unit in base.space.units if unit.has_step]
    weights = error_weights(model.network, batches, base.schedule, units)
    passes = ERROR_WEIGHT_PASSES * base.space.macs(widths_of(model.kept))
    keys = {
        step.name: step.key(stream)
        for step in steps_of(model.network)
        for stream in step.output_layers  # which are as wide
    }
    products = sum(
        unit.pixels * len(weights.channels[keys[unit.name]]) ** 2
        for unit in base.space.units
        if unit.has_step and unit.name in keys  # not of a branch that is gone
    )
    return weights, float(_count(batches) * (passes + products))


def measure(
    base: LoadedBase, kept: KeptIndices, purpose: Purpose = "held-out", share: float = 1.0
) -> Measured:
    """Prune, refit and measure a sub-model, side by side with the base.

    Args:
        base: The base.
        kept: What of each unit is kept.
        purpose: Which images and noise it is measured on.
        share: Share of these, and of the refit's images, to use.
    """
    pruned, space, prune = prune_and_refit(base, kept, share), base.space, base.context.prune
    networks = [] if kept == base.whole.kept else [pruned.network]
    if pruned.macs_spent:
        networks.append(family_of(base.network).cut(base.network, space.units, kept))
    batches = list(base.batches(purpose, share))
    found = run_all([base.network, *networks], batches, base.schedule, prune.precision)
    place, num_images = min(1, len(networks)), _count(batches)  # of the model that is judged
    increases, distances = found.losses[place] - found.losses[0], found.distances[place]
    behind = 0
    if networks:
        behind = space.macs(widths_of(kept)) - _macs_before(base, pruned.network)
    return Measured(
        loss_cut=float(found.losses[-1].mean()),
        loss_refit=None if prune.refit == "none" else float(found.losses[place].mean()),
        macs=pruned.macs_spent + float(num_images * (space.macs_base + len(networks) * behind)),
        num_images=num_images,
        standard_error=_standard_error(increases),
        loss_base=float(found.losses[0].mean()),
        distance=float(distances.mean()),
        distance_error=_standard_error(distances),
    )


def _standard_error(values: Tensor) -> float | None:
    """Return that of the mean of values ``(B,)``; None of a single one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


def _count(batches: Sequence[NoisedBatch]) -> int:
    """Count the images."""
    return sum(len(batch.x_0) for batch in batches)


def _macs_before(base: LoadedBase, pruned: Denoiser) -> int:
    """Count the macs of an image before the first pruned step."""
    base_steps = steps_of(base.network)
    first = num_untouched(base_steps, steps_of(pruned))
    if first == 0:
        return 0
    names = tuple(f"{step.name}." for step in base_steps[first:])
    layers = itertools.takewhile(lambda layer: not f"{layer.name}.".startswith(names), base.layers)
    _, macs = macs_polynomials(list(layers), base.space.units)
    return macs.total(base.space.full)

"""Sensitivities: the increase of the loss when one unit alone is pruned, after the refit."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tdc_ray.config.train import Precision
from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.execution.device import exact_products
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import steps_of
from tdc_ray.models.forward import swapped_weights
from tdc_ray.models.precision import autocast
from tdc_ray.models.step import State, Step, run
from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.reconstruction import reconstruction_scores
from tdc_ray.pruning.criteria.scores import Scores, select_top
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import ErrorWeights
from tdc_ray.pruning.refit.least_squares import (
    ActivationHook,
    LeastSquares,
    ReadLayer,
    layer_matrix,
)
from tdc_ray.seeds import derive_seed

Weights = tuple[Tensor, Tensor]
"""Weights of the layer that reads a unit, in its shape, with 0 for what is pruned, and the
bias."""

Solutions = dict[str, dict[int, Weights]]
"""For every unit, the weights for each width."""


def levels(unit: Unit, num_levels: int) -> list[int]:
    """Return legal widths to measure a unit at: evenly spread below its own, down to the least."""
    legal = unit.legal_widths
    spread = {legal[round((len(legal) - 1) * level / num_levels)] for level in range(num_levels)}
    return sorted(width for width in spread if width < unit.width)


@exact_products()
def solve_units(
    base: Denoiser,
    units: Sequence[Unit],
    scores: Scores,
    batches: Sequence[NoisedBatch],
    schedule: NoiseSchedule,
    weights: ErrorWeights,
    num_levels: int,
) -> tuple[Scores, Solutions, int]:
    """Rank the steps of inner units and solve for the weights after each, at each of its levels.

    The network before a unit is the base's, so one pass over the images serves all units.

    Args:
        base: The base, in eval mode.
        units: Inner units.
        scores: Scores of units that are ranked already.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the base.
        weights: Weight of every image in every step, and of the units' output channels.
        num_levels: Number of widths of each unit.

    Returns:
        Scores, by reconstruction (:func:`reconstruction_scores`) where there were none, the
        weights, and the macs of the statistics.
    """
    scores, solutions, macs = dict(scores), {}, 0
    for unit, squares in _statistics(base, units, batches, schedule, weights):
        macs += squares.macs
        if unit.name not in scores:
            scores[unit.name] = reconstruction_scores(unit, squares, weights.channels[unit.name])
        solutions[unit.name] = {
            width: squares.solve(_columns(unit, scores, width, squares.layer))
            for width in levels(unit, num_levels)
        }
    return scores, solutions, macs


def masked_units(
    base: Denoiser, units: Sequence[Unit], scores: Scores, num_levels: int
) -> Solutions:
    """Return the weights after inner units at each of their levels, without a refit."""
    solutions: Solutions = {}
    layers = reader_layers(steps_of(base))
    for unit in units:
        layer = layers[unit.name]
        solutions[unit.name] = {}
        for width in levels(unit, num_levels):
            kept = _columns(unit, scores, width, layer)
            matrix = torch.zeros_like(layer_matrix(layer))
            matrix[kept] = layer_matrix(layer)[kept]
            weights = matrix.T.reshape(layer.weight.shape).to(layer.weight.dtype)
            solutions[unit.name][width] = (weights, _bias(layer).detach().clone())
    return solutions


@torch.inference_mode()
def measure_units(
    base: Denoiser,
    solutions: Solutions,
    batches: Sequence[NoisedBatch],
    schedule: NoiseSchedule,
    precision: Precision = "fp32",
) -> dict[str, dict[int, float]]:
    """Measure the increase of the mean loss with each of the solutions alone.

    Steps before a unit run once for all levels; only later ones run for each.

    Args:
        base: The base, in eval mode; its weights are changed and put back.
        solutions: Weights to measure with.
        batches: Held-out noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the base.
        precision: Precision of the forward passes.

    Returns:
        The increase over the base's loss for every unit and width.
    """
    all_steps = steps_of(base)
    last = max(i for i, step in enumerate(all_steps) if step.name in solutions)
    increases = {name: dict.fromkeys(widths, 0.0) for name, widths in solutions.items()}
    num_images = sum(len(batch.x_0) for batch in batches)

    for batch in batches:
        with autocast(precision, base.device):
            state = first_state(base, batch, schedule)

        def total(state: State, rest: Sequence[Step], batch: NoisedBatch = batch) -> float:
            with autocast(precision, base.device):
                output = run(rest, state).hidden.float()
            return float(loss_per_image(schedule, output, batch).double().sum())

        unchanged = total(state, all_steps)
        for index, step in enumerate(all_steps[: last + 1]):
            for width, weights in solutions.get(step.name, {}).items():
                layer = step.module.get_submodule(step.output_layer)
                assert isinstance(layer, ReadLayer)
                with swapped_weights(layer, *weights), autocast(precision, base.device):
                    changed = step(state)
                increase = total(changed, all_steps[index + 1 :]) - unchanged
                increases[step.name][width] += increase / num_images
            with autocast(precision, base.device):
                state = step(state)
    return increases


@torch.no_grad()
def _statistics(
    base: Denoiser,
    units: Sequence[Unit],
    batches: Sequence[NoisedBatch],
    schedule: NoiseSchedule,
    weights: ErrorWeights,
) -> Iterator[tuple[Unit, LeastSquares]]:
    """Yield every unit with the normal equations of the layer that reads it, on base states."""
    num_images = sum(len(batch.x_0) for batch in batches)
    all_steps = steps_of(base)
    layers = reader_layers(all_steps)
    squares = {
        unit.name: LeastSquares(
            layers[unit.name], num_rows=num_images * unit.pixels, seed=derive_seed(unit.name)
        )
        for unit in units
    }
    last = max(i for i, step in enumerate(all_steps) if step.name in squares)
    for number, batch in enumerate(batches):
        state = first_state(base, batch, schedule)
        for step in all_steps[: last + 1]:
            if step.name not in squares:
                state = step(state)
                continue
            with ActivationHook(squares[step.name].layer) as hook:
                state = step(state)
            squares[step.name].add(hook.input, hook.output, weights.images[step.name][number])
    for unit in units:
        yield unit, squares.pop(unit.name)


def reader_layers(all_steps: Sequence[Step]) -> dict[str, ReadLayer]:
    """Return the output layer of every step; in a unit's block it reads the unit."""
    layers = {step.name: step.module.get_submodule(step.output_layer) for step in all_steps}
    return {name: layer for name, layer in layers.items() if isinstance(layer, ReadLayer)}


def _columns(unit: Unit, scores: Scores, width: int, layer: ReadLayer) -> Tensor:
    """Return the rows of the layer's matrix that belong to the best steps of a unit."""
    (kept,) = select_top((unit,), scores, {unit.name: width}).values()
    taps = layer.weight[0, 0].numel()
    channels = torch.tensor(unit.channel_indices(kept), device=layer.weight.device)
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()


def _bias(layer: ReadLayer) -> Tensor:
    assert layer.bias is not None  # as every layer that reads a unit has
    return layer.bias

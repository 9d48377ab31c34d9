"""Sensitivities: the increase of the loss when one unit alone is pruned, after the refit."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

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

Weights = tuple[Tensor, Tensor | None]
"""Weights of a layer that reads a unit, in its shape, with 0 for what is pruned, and the bias, if
it has one."""

Solutions = dict[str, dict[int, list[Weights]]]
"""For every unit and width, the weights of each layer that reads the unit."""


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
    for unit, readers in _statistics(base, units, batches, schedule, weights):
        macs += sum(squares.macs for squares in readers.values())
        if unit.name not in scores:
            pairs = [(squares, weights.channels[key]) for key, squares in readers.items()]
            scores[unit.name] = reconstruction_scores(unit, pairs)
        solutions[unit.name] = {
            width: [
                squares.solve(_columns(unit, scores, width, squares.layer))
                if width
                else _removed(squares.layer)
                for squares in readers.values()
            ]
            for width in levels(unit, num_levels)
        }
    return scores, solutions, macs


def masked_units(
    base: Denoiser, units: Sequence[Unit], scores: Scores, num_levels: int
) -> Solutions:
    """Return the weights after inner units at each of their levels, without a refit."""
    layers = reader_layers(steps_of(base))
    return {
        unit.name: {
            width: [
                _masked(layer, _columns(unit, scores, width, layer)) if width else _removed(layer)
                for layer in layers[unit.name].values()
            ]
            for width in levels(unit, num_levels)
        }
        for unit in units
    }


def _masked(layer: ReadLayer, kept: Tensor) -> Weights:
    """Return a layer's weights with 0 for the rows of its matrix that are not kept."""
    matrix = torch.zeros_like(layer_matrix(layer))
    matrix[kept] = layer_matrix(layer)[kept]
    weights = matrix.T.reshape(layer.weight.shape).to(layer.weight.dtype)
    return weights, None if layer.bias is None else layer.bias.detach().clone()


def _removed(layer: ReadLayer) -> Weights:
    """Return weights with which a layer outputs nothing, as where its branch is removed."""
    bias = None if layer.bias is None else torch.zeros_like(layer.bias)
    return torch.zeros_like(layer.weight), bias


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
    layers = reader_layers(all_steps)
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
                with (
                    swapped_readers(layers[step.name].values(), weights),
                    autocast(precision, base.device),
                ):
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
) -> Iterator[tuple[Unit, dict[str, LeastSquares]]]:
    """Yield every unit with the normal equations of layers that read it, on base states."""
    num_images = sum(len(batch.x_0) for batch in batches)
    all_steps = steps_of(base)
    layers, names = reader_layers(all_steps), {unit.name for unit in units}
    squares: dict[str, dict[str, LeastSquares]] = {name: {} for name in names}
    last = max(i for i, step in enumerate(all_steps) if step.name in names)
    for number, batch in enumerate(batches):
        state = first_state(base, batch, schedule)
        for step in all_steps[: last + 1]:
            readers = layers[step.name] if step.name in names else {}
            with ExitStack() as stack:
                hooks = {
                    key: stack.enter_context(ActivationHook(layer))
                    for key, layer in readers.items()
                }
                state = step(state)
            for key, hook in hooks.items():
                if key not in squares[step.name]:
                    rows = num_images * (hook.output[0].numel() // len(readers[key].weight))
                    squares[step.name][key] = LeastSquares(
                        readers[key], num_rows=rows, seed=derive_seed(step.name)
                    )
                image_weights = weights.images[key][number]
                squares[step.name][key].add(hook.input, hook.output, image_weights)
    for unit in units:
        yield unit, squares.pop(unit.name)


def reader_layers(all_steps: Sequence[Step]) -> dict[str, dict[str, ReadLayer]]:
    """Return the output layers of every step, by their keys; in a unit's block they read it."""
    return {
        step.name: {
            step.key(stream): layer
            for stream, name in step.output_layers.items()
            if isinstance(layer := step.module.get_submodule(name), ReadLayer)
        }
        for step in all_steps
    }


@contextmanager
def swapped_readers(layers: Iterable[ReadLayer], weights: Sequence[Weights]) -> Iterator[None]:
    """Replace the weights of the layers that read a unit within the context."""
    with ExitStack() as stack:
        for layer, (weight, bias) in zip(layers, weights, strict=True):
            stack.enter_context(swapped_weights(layer, weight, bias))
        yield


def _columns(unit: Unit, scores: Scores, width: int, layer: ReadLayer) -> Tensor:
    """Return the rows of the layer's matrix that belong to the best steps of a unit."""
    (kept,) = select_top((unit,), scores, {unit.name: width}).values()
    taps = layer.weight[0, 0].numel()
    channels = torch.tensor(unit.channel_indices(kept), device=layer.weight.device)
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()

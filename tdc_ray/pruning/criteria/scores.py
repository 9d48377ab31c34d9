"""Scores of groups and heads: random, magnitude, Taylor, Diff-Pruning, reconstruction.

A higher score is kept longer.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.unet2d.surgery import coupled_parameters
from tdc_ray.models.units import KeptIndices, Unit
from tdc_ray.pruning.refit.least_squares import LeastSquares

DIFF_PRUNING_THRESHOLD = 0.05
"""Diff-Pruning stops where the loss falls below this share of the largest so far."""

Scores = dict[str, list[float]]
"""For every unit, the score of each of its groups or heads, 0 or more."""


def random_scores(units: tuple[Unit, ...], seed: int) -> Scores:
    """Draw every score from [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return {unit.name: torch.rand(unit.width, generator=generator).tolist() for unit in units}


def magnitude_scores(unet: UNet2DModel, units: tuple[Unit, ...]) -> Scores:
    """Score by the squared L2 norm of all weights that go with a group or head."""
    return {
        unit.name: _per_step(
            unit,
            torch.stack(
                [
                    part.by_channel(part.parameter.detach()).square().sum(1)
                    for part in coupled_parameters(unet, unit)
                ]
            ).sum(0),
        )
        for unit in units
    }


def taylor_scores(
    unet: UNet2DModel,
    units: tuple[Unit, ...],
    batches: Iterable[NoisedBatch],
    schedule: NoiseSchedule,
) -> Scores:
    """Score by the first-order change of the loss when a channel goes: ``|sum of w * gradient|``.

    Molchanov et al., arXiv:1611.06440; the gradient is that of the mean loss over all batches.

    Args:
        unet: The base, in eval mode; its gradients are cleared.
        units: Its units.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the model.
    """
    unet.zero_grad(set_to_none=True)
    num_images, size = 0, max_batch_size(unet, gradients=True)
    for part in itertools.chain.from_iterable(batch.split(size) for batch in batches):
        loss_per_image(schedule, part.predict(unet, schedule), part).sum().backward()
        num_images += len(part.x_0)
    scores: Scores = {}
    for unit in units:
        change = sum(
            part.by_channel(_product(part.parameter)).sum(1)
            for part in coupled_parameters(unet, unit)
        )
        assert isinstance(change, Tensor)
        scores[unit.name] = _per_step(unit, change.abs() / num_images)
    unet.zero_grad(set_to_none=True)
    return scores


def diff_pruning_scores(
    unet: UNet2DModel,
    units: tuple[Unit, ...],
    batch: NoisedBatch,
    timesteps: range,
    schedule: NoiseSchedule,
) -> tuple[Scores, int]:
    """Score by ``sum of |w * gradient|``, the gradient added up over the timesteps that matter.

    Diff-Pruning (Fang et al., arXiv:2305.10924): one batch, one noise; t runs upwards and stops at
    the first whose loss is below :data:`DIFF_PRUNING_THRESHOLD` times the largest so far.

    Args:
        unet: The base, in eval mode; its gradients are cleared.
        units: Its units.
        batch: Images and noise; its timesteps are not heeded.
        timesteps: The group's, all of which count where the threshold never fires.
        schedule: The noise schedule, on the device of the model.

    Returns:
        The scores, and how many timesteps were looked at.
    """
    unet.zero_grad(set_to_none=True)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    largest, seen = 0.0, 0
    for timestep in timesteps:
        at = replace(batch, timesteps=torch.full_like(batch.timesteps, timestep))
        loss, gradients = _noise_error(unet, at, parameters, schedule)
        seen += 1
        if loss < DIFF_PRUNING_THRESHOLD * largest:
            break
        largest = max(largest, loss)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    scores: Scores = {}
    for unit in units:
        parts = coupled_parameters(unet, unit)
        weight = sum(part.by_channel(_product(part.parameter).abs()).sum(1) for part in parts)
        assert isinstance(weight, Tensor)
        scores[unit.name] = _per_step(unit, weight)
    unet.zero_grad(set_to_none=True)
    return scores, seen


def _noise_error(
    unet: UNet2DModel,
    batch: NoisedBatch,
    parameters: Sequence[nn.Parameter],
    schedule: NoiseSchedule,
) -> tuple[float, list[Tensor]]:
    """Give the mean squared error of the predicted noise over a batch, and its gradients."""
    loss = 0.0
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for part in batch.split(max_batch_size(unet, gradients=True)):
        predicted = part.predict(unet, schedule)[:, : part.epsilon.shape[1]]
        error = (predicted - part.epsilon).square().mean() * (len(part.x_0) / len(batch.x_0))
        loss += error.item()
        for gradient, more in zip(gradients, torch.autograd.grad(error, parameters), strict=True):
            gradient += more
    return loss, gradients


def reconstruction_scores(unit: Unit, squares: LeastSquares) -> list[float]:
    """Score a residual block's groups, or an attention's heads, by what the refit cannot make up.

    One after the other goes whichever leaves the smallest squared error in the layer behind the
    unit when all weights that are left are solved for anew: the optimal brain surgeon (Hassibi and
    Stork, 1993) for whole groups. The score of one is the error by the time that it goes.

    Args:
        unit: The unit.
        squares: Of the layer that reads it, on the base's own activations.
    """
    gram, cross = squares.normal()
    inverse = torch.linalg.inv(gram)
    weights = inverse @ cross  # (n, m)
    size = len(gram) // unit.width
    left = {step: slice(step * size, (step + 1) * size) for step in range(unit.width)}
    scores, error = [0.0] * unit.width, 0.0
    while left:
        rise = {
            step: float((weights[own] * torch.linalg.solve(inverse[own, own], weights[own])).sum())
            for step, own in left.items()
        }
        step = min(rise, key=rise.__getitem__)
        own = left.pop(step)
        error += max(rise[step], 0.0)
        scores[step] = error
        both = torch.linalg.solve(inverse[own, own], torch.cat([weights[own], inverse[own]], 1))
        change = inverse[:, own] @ both  # (n, m + n)
        weights = weights - change[:, : weights.shape[1]]
        inverse = inverse - change[:, weights.shape[1] :]
    return scores


def select_top(units: tuple[Unit, ...], scores: Scores, widths: dict[str, int]) -> KeptIndices:
    """Choose which groups and heads stay: those of the highest scores, the first of equals."""
    kept = {}
    for unit in units:
        ranked = sorted(range(unit.width), key=lambda i: (-scores[unit.name][i], i))
        kept[unit.name] = tuple(sorted(ranked[: widths[unit.name]]))
    return kept


def _product(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.detach() * parameter.grad


def _per_step(unit: Unit, per_channel: Tensor) -> list[float]:
    """Add up the channels of each group, head or slice: ``(channels,)`` -> ``width`` floats."""
    places = torch.tensor([unit.places((step,)) for step in range(unit.width)])
    values: list[float] = per_channel.double()[places].sum(1).tolist()
    return values

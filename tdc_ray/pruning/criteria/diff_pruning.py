"""Diff-Pruning: Taylor over the timesteps that matter (Fang et al., arXiv:2305.10924)."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.scores import (
    Scores,
    channel_sums,
    sum_by_step,
    weight_times_gradient,
)

DIFF_PRUNING_BATCH = 32
"""Images of the one batch, at most; it goes through the network at every timestep."""

DIFF_PRUNING_THRESHOLD = 0.05
"""The sum stops where the loss falls below this share of the largest so far."""


def diff_pruning_scores(
    network: Denoiser,
    units: tuple[Unit, ...],
    batch: NoisedBatch,
    timesteps: range,
    schedule: NoiseSchedule,
) -> tuple[Scores, int]:
    """Score by ``sum of |w * gradient|``, the gradient added up over the timesteps that matter.

    One batch, one noise; t runs upwards and stops at the first timestep whose loss is below
    :data:`DIFF_PRUNING_THRESHOLD` times the largest so far.

    Args:
        network: The base, in eval mode; its gradients are cleared.
        units: Its units.
        batch: Images and noise; its timesteps are not used.
        timesteps: The group's, all of which count where the threshold never fires.
        schedule: The noise schedule, on the device of the model.

    Returns:
        The scores, and how many timesteps the network was run at.
    """
    network.zero_grad(set_to_none=True)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    largest, num_timesteps = 0.0, 0
    for timestep in timesteps:
        at = replace(batch, timesteps=torch.full_like(batch.timesteps, timestep))
        loss, gradients = _noise_error(network, at, parameters, schedule)
        num_timesteps += 1
        if loss < DIFF_PRUNING_THRESHOLD * largest:
            break
        largest = max(largest, loss)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    scores: Scores = {}
    for unit in units:
        sums = channel_sums(network, unit, lambda weight: weight_times_gradient(weight).abs())
        scores[unit.name] = sum_by_step(unit, functools.reduce(torch.add, sums))
    network.zero_grad(set_to_none=True)
    return scores, num_timesteps


def _noise_error(
    network: Denoiser,
    batch: NoisedBatch,
    parameters: Sequence[nn.Parameter],
    schedule: NoiseSchedule,
) -> tuple[float, list[Tensor]]:
    """Compute the mean squared error of the predicted noise over a batch, and its gradients."""
    loss = 0.0
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for part in batch.split(max_batch_size(network, gradients=True)):
        target = part.target(schedule)
        predicted = part.predict(network, schedule)[:, : target.shape[1]]
        error = (predicted - target).square().mean() * (len(part.x_0) / len(batch.x_0))
        loss += error.item()
        for gradient, more in zip(gradients, torch.autograd.grad(error, parameters), strict=True):
            gradient += more
    return loss, gradients

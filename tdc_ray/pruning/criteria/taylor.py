"""Taylor: the first-order change of the loss (Molchanov et al., arXiv:1611.06440)."""

import functools
import itertools
from collections.abc import Iterable

import torch

from tdc_ray.diffusion.loss import loss_per_image
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


def taylor_scores(
    network: Denoiser,
    units: tuple[Unit, ...],
    batches: Iterable[NoisedBatch],
    schedule: NoiseSchedule,
) -> Scores:
    """Score by the first-order change of the loss without a channel: ``|sum of w * gradient|``.

    The gradient is that of the mean loss over all batches.

    Args:
        network: The base, in eval mode; its gradients are cleared.
        units: Its units.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the model.
    """
    network.zero_grad(set_to_none=True)
    num_images, size = 0, max_batch_size(network, gradients=True)
    for part in itertools.chain.from_iterable(batch.split(size) for batch in batches):
        loss_per_image(schedule, part.predict(network, schedule), part).sum().backward()
        num_images += len(part.x_0)
    scores: Scores = {}
    for unit in units:
        change = functools.reduce(torch.add, channel_sums(network, unit, weight_times_gradient))
        scores[unit.name] = sum_by_step(unit, change.abs() / num_images)
    network.zero_grad(set_to_none=True)
    return scores

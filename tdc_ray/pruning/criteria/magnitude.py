"""Magnitude: the size of the weights, whatever the data."""

import torch

from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.scores import Scores, channel_sums, sum_by_step


def magnitude_scores(network: Denoiser, units: tuple[Unit, ...]) -> Scores:
    """Score by the squared L2 norm of all weights of a group or head."""
    return {
        unit.name: sum_by_step(
            unit,
            torch.stack(channel_sums(network, unit, lambda weight: weight.detach().square())).sum(
                0
            ),
        )
        for unit in units
    }

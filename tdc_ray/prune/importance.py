"""Scores of groups and heads: random, magnitude, Taylor. A higher score is kept longer."""

from collections.abc import Iterable
from typing import Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.diffusion import NoiseSchedule, denoising_loss
from tdc_ray.models.surgery import coupled
from tdc_ray.models.units import Kept, Unit

Method = Literal["random", "magnitude", "taylor"]

Scores = dict[str, list[float]]
"""For every unit, the score of each of its groups or heads, 0 or more."""

NoisedBatch = tuple[Tensor, Tensor, Tensor]
"""x_0 in [-1, 1] ``(B, C, H, W)``, epsilon ``(B, C, H, W)``, timesteps ``(B,)``."""


def random_scores(units: tuple[Unit, ...], seed: int) -> Scores:
    """Draw every score from [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return {unit.name: torch.rand(unit.width, generator=generator).tolist() for unit in units}


def magnitude_scores(unet: UNet2DModel, units: tuple[Unit, ...]) -> Scores:
    """Score by the squared L2 norm of all weights that go with a group or head."""
    return {
        unit.name: _per_group(
            unit,
            torch.stack(
                [
                    part.by_channel(part.parameter.detach()).square().sum(1)
                    for part in coupled(unet, unit)
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
    num_images = 0
    for x_0, epsilon, timesteps in batches:
        denoising_loss(unet, schedule, x_0, epsilon, timesteps).sum().backward()
        num_images += len(x_0)
    scores: Scores = {}
    for unit in units:
        change = torch.zeros(unit.width * unit.channels, device=schedule.signal.device)
        for part in coupled(unet, unit):
            parameter = part.parameter
            assert parameter.grad is not None
            change += part.by_channel(parameter.detach() * parameter.grad).sum(1)
        scores[unit.name] = _per_group(unit, change.abs() / num_images)
    unet.zero_grad(set_to_none=True)
    return scores


def keep_best(units: tuple[Unit, ...], scores: Scores, widths: dict[str, int]) -> Kept:
    """Choose which groups and heads stay: those of the highest scores, the first of equals."""
    kept = {}
    for unit in units:
        ranked = sorted(range(unit.width), key=lambda i: (-scores[unit.name][i], i))
        kept[unit.name] = tuple(sorted(ranked[: widths[unit.name]]))
    return kept


def _per_group(unit: Unit, per_channel: Tensor) -> list[float]:
    """Add up the channels of each group or head: ``(width * channels,)`` -> ``width`` floats."""
    values: list[float] = per_channel.double().view(unit.width, unit.channels).sum(1).tolist()
    return values

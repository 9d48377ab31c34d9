"""Importance scores of a unit's steps (groups, heads, slices): lower ones are pruned first."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.surgery import coupled_parameters
from tdc_ray.models.units import KeptIndices, Unit

Scores = dict[str, list[float]]
"""For every unit, the score of each of its groups or heads, 0 or more."""


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """The input of a criterion."""

    network: Denoiser
    """The base, in eval mode; a criterion that computes gradients clears them."""

    units: tuple[Unit, ...]
    timesteps: range
    """The group's."""

    batches: Iterable[NoisedBatch]
    """Noised images of these timesteps; loaded when a criterion reads them."""

    num_images: int
    """Number of these images."""

    schedule: NoiseSchedule
    """On the device of the base."""

    seed: int
    """Seed, which differs by group."""


def select_top(units: tuple[Unit, ...], scores: Scores, widths: Mapping[str, int]) -> KeptIndices:
    """Choose the groups and heads to keep: those of the highest scores, the first of equals."""
    kept = {}
    for unit in units:
        ranked = sorted(range(unit.width), key=lambda i: (-scores[unit.name][i], i))
        kept[unit.name] = tuple(sorted(ranked[: widths[unit.name]]))
    return kept


def channel_sums(
    network: Denoiser, unit: Unit, values: Callable[[nn.Parameter], Tensor]
) -> list[Tensor]:
    """Sum values of the weights of each of a unit's channels, for every parameter.

    Args:
        network: The unpruned network.
        unit: One of its units.
        values: Computes a tensor of a parameter's shape.

    Returns:
        ``(channels,)`` for each parameter that has the unit's channels.
    """
    return [
        coupled.by_channel(values(coupled.parameter)).sum(1)
        for coupled in coupled_parameters(network, unit)
    ]


def weight_times_gradient(parameter: nn.Parameter) -> Tensor:
    """Multiply a parameter by its gradient, elementwise."""
    assert parameter.grad is not None
    return parameter.detach() * parameter.grad


def sum_by_step(unit: Unit, per_channel: Tensor) -> list[float]:
    """Sum over the channels of each group, head or slice: ``(channels,)`` -> ``width`` floats."""
    indices = torch.tensor([unit.channel_indices((step,)) for step in range(unit.width)])
    values: list[float] = per_channel.double()[indices].sum(1).tolist()
    return values

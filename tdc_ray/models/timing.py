"""How long a forward pass takes on a device, step by step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import blank_labels, family_of
from tdc_ray.models.labels import Labels
from tdc_ray.models.network_config import image_size

MAX_REPEATS = 200
"""Most forward passes of each model."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians over the passes of a model, in seconds."""

    total: float
    """Sum of the medians: on a busy machine other processes disturb one step or another of nearly
    every pass, so that hardly a pass as a whole is undisturbed."""

    steps: dict[str, float]
    """By the dotted names of the steps' modules."""


def device_name(device: torch.device) -> str:
    """Return a device's name, with whatever else decides its speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def time_passes(
    networks: Sequence[Denoiser], batch_size: int, *, min_repeats: int, min_seconds: float
) -> list[StepTimes]:
    """Time forward passes of models that differ in nothing but widths, on random images.

    They run alternately, so that other load of the machine affects all of them alike.

    Args:
        networks: In eval mode, on one device.
        batch_size: Images of a pass.
        min_repeats: Least passes of each.
        min_seconds: There are more until this time has passed, at most :data:`MAX_REPEATS`.
    """
    passes: list[list[list[float]]] = [[] for _ in networks]
    batch = _random_batch(networks[0], batch_size)
    for network in networks:
        _pass(network, batch)  # allocates memory and chooses kernels
    began = time.perf_counter()
    for number in range(MAX_REPEATS):
        if number >= min_repeats and time.perf_counter() - began >= min_seconds:
            break
        for network, times in zip(networks, passes, strict=True):
            times.append(_pass(network, batch))
    names = [step.name for step in family_of(networks[0]).steps(networks[0])]
    medians = [[median(step) for step in zip(*times, strict=True)] for times in passes]
    return [StepTimes(sum(times), dict(zip(names, times[1:], strict=True))) for times in medians]


def _random_batch(network: Denoiser, batch_size: int) -> tuple[Tensor, Tensor, Labels]:
    """Return noise, timesteps and, for a network that reads them, labels."""
    config, device = network.config, network.device
    shape = (batch_size, config["in_channels"], *image_size(config))
    timesteps = torch.ones(batch_size, dtype=torch.long, device=device)
    return torch.randn(shape, device=device), timesteps, blank_labels(network, batch_size)


def _pass(network: Denoiser, batch: tuple[Tensor, Tensor, Labels]) -> list[float]:
    """Return the seconds up to the first step, and of each step."""
    family, (mark, seconds) = family_of(network), _clock(network.device)
    all_steps = family.steps(network)
    marks = [mark()]
    state = family.start(network, *batch)
    marks.append(mark())
    for step in all_steps:
        state = step(state)
        marks.append(mark())
    return [seconds(one, other) for one, other in pairwise(marks)]


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Return functions that mark moments of a device's work, and compute seconds between marks."""
    if device.type != "cuda":
        return time.perf_counter, lambda one, other: other - one

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(one: torch.cuda.Event, other: torch.cuda.Event) -> float:
        other.synchronize()
        return float(one.elapsed_time(other)) / 1e3

    return mark, seconds

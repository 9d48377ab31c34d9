"""How long a forward pass takes on a device, step by step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.models.network_config import image_size
from tdc_ray.models.unet2d.steps import start, steps

MAX_REPEATS = 200
"""Most passes of each model."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians over the passes of a model, in seconds."""

    total: float
    """Sum of the medians: what other processes take of a busy machine hits now this step and now
    that one, so that hardly a pass as a whole is undisturbed."""

    steps: dict[str, float]
    """By the dotted names of the steps' modules."""


def device_name(device: torch.device) -> str:
    """Name what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


@torch.inference_mode()
def time_passes(
    unets: Sequence[UNet2DModel], batch_size: int, *, min_repeats: int, min_seconds: float
) -> list[StepTimes]:
    """Time forward passes of models that differ in nothing but widths, on random images.

    They take turns, so that whatever else the machine does meanwhile hits all alike.

    Args:
        unets: The models, in eval mode on one device.
        batch_size: Images of a pass.
        min_repeats: Least passes of each.
        min_seconds: There are more until this has gone by, at most :data:`MAX_REPEATS`.
    """
    found: list[list[list[float]]] = [[] for _ in unets]
    batch = _random_batch(unets[0], batch_size)
    for unet in unets:
        _pass(unet, batch)  # memory is taken, and kernels are chosen
    began = time.perf_counter()
    for number in range(MAX_REPEATS):
        if number >= min_repeats and time.perf_counter() - began >= min_seconds:
            break
        for unet, passes in zip(unets, found, strict=True):
            passes.append(_pass(unet, batch))
    names = [step.name for step in steps(unets[0])]
    times = [[median(part) for part in zip(*passes, strict=True)] for passes in found]
    return [StepTimes(sum(parts), dict(zip(names, parts[1:], strict=True))) for parts in times]


def _random_batch(unet: UNet2DModel, batch_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give noise, timesteps and, for a UNet that is told them, classes."""
    config, device = unet.config, unet.device
    shape = (batch_size, config["in_channels"], *image_size(unet.config))
    zeros = torch.zeros(batch_size, dtype=torch.long, device=device)
    has_classes = config["num_class_embeds"] is not None
    return torch.randn(shape, device=device), zeros + 1, zeros if has_classes else None


def _pass(unet: UNet2DModel, batch: tuple[Tensor, Tensor, Tensor | None]) -> list[float]:
    """Give the seconds of what comes before the first step, and of each step."""
    mark, seconds = _clock(unet.device)
    all_steps = steps(unet)
    marks = [mark()]
    state = start(unet, *batch)
    marks.append(mark())
    for step in all_steps:
        state = step(state)
        marks.append(mark())
    return [seconds(one, other) for one, other in pairwise(marks)]


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Give what marks a moment of a device's work, and what tells seconds between two marks."""
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

"""Resolves precision ``auto``: measures on the workers whether bf16 is faster than fp32."""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import Precision
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Report, WorkItem, actor_resources, base_resources
from tdc_ray.models.layer import total
from tdc_ray.models.network_config import NetworkConfig, image_size
from tdc_ray.models.precision import autocast, in_layout
from tdc_ray.models.structure import network_structure
from tdc_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)

Stage = Literal["base", "finetune", "prune"]

LEAST_GAIN = 1.1
"""How many times as fast as fp32 bf16 must be to be chosen."""

REPEATS = 5
"""Timed repeats of each precision, after one that warms up."""

NUM_IMAGES = 16
"""Batch size of the layer that is timed."""


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """Time a denoiser's widest and most frequent kind of layer in fp32 and in bf16."""

    channels: int
    size: tuple[int, int]
    """Height and width, in pixels."""

    trains: bool
    """With the backward pass."""


@dataclass(frozen=True, slots=True)
class PrecisionResult:
    """The faster precision, and the median seconds of both."""

    precision: Precision
    fp32_seconds: float
    bf16_seconds: float


def resolve_auto_precision(
    run_dir: RunDir, config: RunConfig, unet: NetworkConfig, stages: Sequence[Stage]
) -> Chain[RunConfig]:
    """Replace every ``auto`` by the precision that is fastest on the workers, measured once.

    Args:
        run_dir: The run.
        config: Its settings.
        unet: The base's config.
        stages: The stages that will run.

    Returns:
        Settings without ``auto`` in these stages.
    """
    base, actor = base_resources(config.compute), actor_resources(config.compute)
    for stage in stages:
        if getattr(config, stage).precision != "auto":
            continue
        job = ProbeJob(
            channels=total(network_structure(unet).layers[0].outputs),
            size=image_size(unet),
            trains=stage != "prune",
        )
        item = WorkItem(
            key=f"precision/{stage}",
            function=benchmark_precision,
            job=job,
            result_path=run_dir.precision / f"{stage}.json",
            cost=0.0,
            resources=base if stage == "base" else actor,
            result_type=PrecisionResult,
        )
        result = yield from result_of(item)
        logger.info(
            "%s.precision auto is %s here: bf16 takes %.2f of the time of fp32",
            stage,
            result.precision,
            result.bf16_seconds / result.fp32_seconds,
        )
        chosen = replace(getattr(config, stage), precision=result.precision)
        config = replace(config, **{stage: chosen})
    return config


def benchmark_precision(job: ProbeJob, report: Report) -> PrecisionResult:
    """Measure both precisions on this worker's device."""
    device = worker_device()
    conv = nn.Conv2d(job.channels, job.channels, 3, padding=1)
    layer = nn.Sequential(conv, nn.SiLU(), conv).to(device)
    x = torch.randn(NUM_IMAGES, job.channels, *job.size, device=device)
    seconds: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(REPEATS + 1):
        for precision, times in seconds.items():
            times.append(_seconds(in_layout(layer, precision), x, precision, trains=job.trains))
    fp32, bf16 = (statistics.median(times[1:]) for times in seconds.values())
    report({}, 1)
    supported = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    is_faster = supported and fp32 >= LEAST_GAIN * bf16
    return PrecisionResult("bf16" if is_faster else "fp32", fp32, bf16)


def _seconds(layer: nn.Module, x: torch.Tensor, precision: Precision, *, trains: bool) -> float:
    _wait_for(x.device)
    started = time.perf_counter()
    with torch.set_grad_enabled(trains), autocast(precision, x.device):
        total = layer(x).float().sum()
    if trains:
        total.backward()
    _wait_for(x.device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

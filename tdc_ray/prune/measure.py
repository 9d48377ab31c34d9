"""Work on one group's timesteps: scores of the base's units, and the loss of a pruned model.

Loss is measured on the same images, timesteps and noise for every candidate of a group. The noise
is held out: no training step draws it. The images are training images.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel

from tdc_ray.config import RunConfig
from tdc_ray.data import fixed_batches, to_model_range
from tdc_ray.datasets import load_dataset
from tdc_ray.device import worker_device
from tdc_ray.diffusion import denoising_loss, noise_schedule
from tdc_ray.layout import RunDir
from tdc_ray.models.surgery import cut
from tdc_ray.models.unet import load_unet, unet_config
from tdc_ray.models.units import Kept, units_of
from tdc_ray.plan import Group
from tdc_ray.prune.importance import (
    NoisedBatch,
    magnitude_scores,
    random_scores,
    taylor_scores,
)
from tdc_ray.seeds import derive_seed
from tdc_ray.work import Report, Result


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Score the base's units on a group's timesteps."""

    run_dir: RunDir
    config: RunConfig
    group: Group


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """Cut the base and measure the loss on a group's timesteps."""

    run_dir: RunDir
    config: RunConfig
    group: Group
    kept: Kept
    number: int
    """Place in the group's search, from 0: the base; the step of its metrics."""


def score_units(job: ScoreJob, report: Report) -> Result:
    """Give ``scores`` (a list per unit) by the method of the config, and ``seconds``."""
    started = time.perf_counter()
    config, device = job.config, worker_device()
    units = units_of(unet_config(job.run_dir.base_unet))
    method = config.prune.method
    if method == "random":
        scores = random_scores(units, derive_seed(config.seed, "random", job.group.index))
    else:
        unet = load_unet(job.run_dir.base_unet).to(device)
        if method == "magnitude":
            scores = magnitude_scores(unet, units)
        else:
            batches = noised_batches(config, job.group, device, purpose="scores")
            schedule = noise_schedule(config.diffusion).to(device)
            scores = taylor_scores(unet, units, batches, schedule)
    report({}, 1)
    return {"scores": scores, "seconds": time.perf_counter() - started}


def measure_candidate(job: MeasureJob, report: Report) -> Result:
    """Give ``loss_cut`` of the base cut to what is kept, and ``seconds``."""
    started = time.perf_counter()
    device = worker_device()
    units = units_of(unet_config(job.run_dir.base_unet))
    unet = cut(load_unet(job.run_dir.base_unet), units, job.kept).to(device)
    loss = held_out_loss(unet, job.config, job.group)
    report({"loss_cut": loss}, job.number)
    return {"loss_cut": loss, "seconds": time.perf_counter() - started}


@torch.inference_mode()
def held_out_loss(unet: UNet2DModel, config: RunConfig, group: Group) -> float:
    """Mean training loss on held-out noise of a group's timesteps."""
    device = next(unet.parameters()).device
    schedule = noise_schedule(config.diffusion).to(device)
    unet.eval()
    losses = [
        denoising_loss(unet, schedule, x_0, epsilon, timesteps)
        for x_0, epsilon, timesteps in noised_batches(config, group, device, purpose="held-out")
    ]
    return float(torch.cat(losses).double().mean())


def noised_batches(
    config: RunConfig, group: Group, device: torch.device, *, purpose: str
) -> Iterator[NoisedBatch]:
    """Give ``prune.num_images`` images with noise and timesteps, the same ones at every call.

    The timesteps are spread evenly over the group's.
    """
    count, timesteps = config.prune.num_images, group.timesteps
    seed = derive_seed(config.seed, purpose, group.first, group.last)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(count, generator=generator) * len(timesteps) // count
    dataset = load_dataset(config.data)
    start = 0
    for images, _ in fixed_batches(dataset, count, config.prune.batch_size, seed):
        x_0 = to_model_range(images)
        epsilon = torch.randn(x_0.shape, generator=generator)
        drawn = timesteps.start + places[start : start + len(x_0)]
        start += len(x_0)
        yield x_0.to(device), epsilon.to(device), drawn.to(device)

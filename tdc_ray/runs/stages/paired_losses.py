"""Compares the denoising losses of two models, group by group, on the same images and noise.

The images are those that no fine-tune and no choice of a search has seen, the noise is drawn for
this alone. A difference of two losses on the same noise is far less noisy than either of them, and
than any distance between few sampled images.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import halves, held_out_split, to_minus_one_one
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Inputs, Report, WorkItem
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import labels_for, load_network
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.saved_expert import CONFIG_FILE, load_expert
from tdc_ray.runs.results import LossDifference
from tdc_ray.runs.stages.data_key import run_data_key
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import atomic_path, exists, fetch

VERSION = 1
"""Changes whenever losses do, so that cached ones are measured again."""

CONFIDENCE = 0.95
"""Of the intervals."""

DRAWN_AT_ONCE = 256
"""Images whose noise is drawn at once, so that the number measured at once changes no noise."""


@dataclass(frozen=True, slots=True)
class PairedJob:
    """Measure two models of a group's timesteps, each a saved network or expert."""

    config: RunConfig
    group: TimestepGroup
    tdc: Path
    base: Path
    path: Path
    """Where the losses go, ``(2, images)``, float64: TDC's, then the base's, for every image the
    mean over its noise."""


@dataclass(frozen=True, slots=True)
class PairedResult:
    """How many images were measured; their losses are in a file."""

    num_images: int
    num_noised: int
    """All times that an image was noised."""

    seconds: float


def paired_item(
    key: str, job: PairedJob, macs: Sequence[float]
) -> WorkItem[PairedJob, PairedResult]:
    """Make the item that measures two models, of so many macs, on a group's timesteps."""
    return WorkItem(
        key=key,
        function=measure_pair,
        job=job,
        result_path=job.path.with_suffix(".json"),
        result_type=PairedResult,
        cost=sum(macs) * job.config.compare.num_images,
        inputs=paired_inputs,
        files=(job.path,),
    )


def paired_inputs(job: PairedJob) -> Inputs:
    """Return what the losses follow from."""
    config = job.config
    return {
        "stage": "paired-losses",
        "version": VERSION,
        "models": [weights_digest(job.tdc), weights_digest(job.base)],
        "timesteps": [job.group.first, job.group.last],
        "num_images": config.compare.num_images,
        "held_out_share": config.prune.held_out_share,
        **run_data_key(config),
    }


@torch.inference_mode()
def measure_pair(job: PairedJob, report: Report) -> PairedResult:
    """Measure the mean loss of both models on every image."""
    started, device = time.perf_counter(), worker_device()
    models = [_load(folder).to(device) for folder in (job.tdc, job.base)]
    schedule = noise_schedule(job.config.diffusion).to(device)
    losses: list[list[Tensor]] = [[], []]
    for batch in unseen_batches(job.config, job.group, models):
        for model, found in zip(models, losses, strict=True):
            found.append(loss_per_image(schedule, batch.predict(model, schedule), batch).cpu())
    by_noise = torch.stack([torch.cat(found).double() for found in losses])
    count = len(unseen_images(job.config))
    by_image = by_noise.reshape(2, -1, count).mean(1)
    with atomic_path(job.path) as temporary, temporary.open("wb") as file:
        np.save(file, by_image.numpy())
    report({}, 1)
    return PairedResult(count, by_noise.shape[1], time.perf_counter() - started)


def _load(folder: Path) -> Denoiser:
    """Load an expert, or a whole network, in eval mode."""
    return load_expert(folder) if exists(folder / CONFIG_FILE) else load_network(folder)


def unseen_images(config: RunConfig) -> Sequence[int]:
    """Return the indices of the images that no fine-tune and no choice of a search has seen.

    Stage 1 has, unless ``prune.held_out_of_base``. No more of them than ``compare.num_images``.
    """
    dataset = training_data(config.data, config.evaluate.cache_dir).open()
    _, held_out = held_out_split(dataset, config.prune.held_out_share, config.seed)
    return halves(held_out)[1][: config.compare.num_images]


def unseen_batches(
    config: RunConfig, group: TimestepGroup, models: Sequence[Denoiser]
) -> Iterator[NoisedBatch]:
    """Yield the noised images on which models are compared, on the models' device.

    Each image in turn, all equally often, with new noise every time; the timesteps are spread
    evenly over the group's.
    """
    dataset = training_data(config.data, config.evaluate.cache_dir).open()
    indices, timesteps = unseen_images(config), group.timesteps
    count = len(indices) * -(-config.compare.num_images // len(indices))
    seed = derive_seed(config.seed, "comparison", group.first, group.last)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randperm(count, generator=generator) * len(timesteps) // count
    device, size = models[0].device, min(map(max_batch_size, models))
    firsts = (
        (start, start + first)
        for start in range(0, count, len(indices))
        for first in range(0, len(indices), DRAWN_AT_ONCE)
    )
    for start, first in firsts:
        images, labels = dataset.__getitems__(indices[first - start :][:DRAWN_AT_ONCE])
        x_0 = to_minus_one_one(images)
        batch = NoisedBatch(
            x_0,
            torch.randn(x_0.shape, generator=generator),
            timesteps.start + offsets[first : first + len(x_0)],
            labels_for(models[0], labels),
        )
        yield from batch.to(device).split(size)


def paired_difference(path: Path) -> LossDifference:
    """Compute means and the interval of the difference from what :func:`measure_pair` wrote."""
    return difference_of(np.load(fetch(path)))


def mean_difference(paths: Sequence[Path], groups: Sequence[TimestepGroup]) -> LossDifference:
    """Compute the same over all timesteps alike: of training's own loss (DDPM's L_simple).

    The images are the same in all groups, so they are what the interval rests on.
    """
    shares = np.array([len(group.timesteps) for group in groups], np.float64)
    losses = np.stack([np.load(fetch(path)) for path in paths], axis=-1)  # (2, images, groups)
    return difference_of(losses @ (shares / shares.sum()))


def mean_by_image(values: FloatArray, images: Sequence[int]) -> FloatArray:
    """Average values of noised images, ``(..., B)``, over those of the same image."""
    distinct, counts = np.unique(images, return_counts=True)
    means: FloatArray = values @ ((np.asarray(images)[:, None] == distinct) / counts)
    return means


def difference_of(losses: FloatArray) -> LossDifference:
    """Compute the mean losses of two models, and the interval of their paired difference.

    Student's interval over the images: repeated noise of one image is averaged before, for its
    losses are not independent.

    Args:
        losses: TDC's and the base's of every image, ``(2, images)``.
    """
    differences = losses[0] - losses[1]
    count, mean = len(differences), float(differences.mean())
    margin = math.inf
    if count > 1:
        deviation = float(differences.std(ddof=1))
        margin = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(count)
    return LossDifference(
        loss_tdc=float(losses[0].mean()),
        loss_base=float(losses[1].mean()),
        difference=mean,
        low=mean - margin,
        high=mean + margin,
    )

"""Each network's loss at each sampling step, on held-out images and the same noise for all."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import fixed_indices, halves, held_out_split, to_minus_one_one
from tdc_ray.data.latents import TrainingData
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule, noise_schedule
from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.diffusion.step_schedule import (
    BoolArray,
    choose_networks,
    stitched,
)
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import labels_for
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.labels import Captions
from tdc_ray.runs.stages.paired_losses import difference_of, mean_by_image
from tdc_ray.runs.step_schedule.networks import Problem
from tdc_ray.seeds import derive_seed

logger = logging.getLogger(__name__)

CHOOSE, JUDGE = 0, 1
"""Which half of the held-out images networks are chosen by, and which judges the choice."""


@dataclass(frozen=True, eq=False, slots=True)
class MeasuredSteps:
    """Networks at sampling steps, and their losses on the half that is chosen by."""

    problem: Problem
    losses: FloatArray
    """``(S, K)``: mean squared errors of epsilon; no number where a network may not run."""

    weights: FloatArray
    """``(S,)``: what a squared error at a step is worth; as often as the sampler visits it."""

    def choose(self, macs_share: float) -> list[int]:
        """Choose the network of every step within a budget, by the sum of its losses."""
        excess = self.weights[:, None] * (self.losses - self.losses[:, :1])
        excess = np.where(self.problem.allowed, excess, np.inf)
        return choose_networks(excess, self.problem.macs, self.problem.budget(macs_share))

    def stitch(self, macs_share: float) -> list[int]:
        """Assign the noisiest steps to the cheapest networks and the rest to the dearest."""
        problem = self.problem
        return stitched(problem.allowed, problem.macs, problem.budget(macs_share))


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a schedule takes and costs, on images and noise that no choice has seen."""

    mean_macs: float
    """Of a sampling step."""

    mean_macs_share: float
    """The same as a share of the base's."""

    excess: float
    """Mean over the sampling steps of the squared error of epsilon, above the base's, as a share
    of the base's; below 0 is better than the base."""

    low: float
    """Of its 95 % interval, Student's over images; the noise of each is averaged before."""

    high: float


def measure_steps(
    config: RunConfig, data: TrainingData, problem: Problem, num_images: int
) -> MeasuredSteps:
    """Measure every network at every step where it may run, on the half that is chosen by.

    Args:
        config: The run's settings.
        data: What its networks were trained on.
        problem: Networks and steps.
        num_images: Noised images at each step.
    """
    errors = _squared_errors(config, data, problem, problem.allowed, CHOOSE, num_images)
    visits = problem.macs[:, 0] / problem.macs_base
    return MeasuredSteps(problem, errors.mean(2), visits)


def judge(
    config: RunConfig,
    data: TrainingData,
    measured: MeasuredSteps,
    choices: Sequence[Sequence[int]],
    num_images: int,
) -> list[Judgement]:
    """Hold schedules against the base, on images and noise that none was chosen by."""
    problem, steps = measured.problem, np.arange(len(measured.weights))
    wanted = np.zeros_like(problem.allowed)
    wanted[:, 0] = True
    for choice in choices:
        wanted[steps, choice] = True
    logger.info("comparing the schedules on other images and noise")
    errors = _squared_errors(config, data, problem, wanted, JUDGE, num_images)
    images = _chosen(config, len(data.open()), JUDGE, num_images)
    of_base = measured.weights @ mean_by_image(errors[:, 0], images)  # (images,)
    judgements = []
    for choice in choices:
        losses = measured.weights @ mean_by_image(errors[steps, choice], images)
        found = difference_of(np.stack([losses, of_base]) / of_base.mean())
        macs = problem.mean_macs(choice)
        judgements.append(
            Judgement(
                mean_macs=macs,
                mean_macs_share=macs / problem.macs_base,
                excess=found.difference,
                low=found.low,
                high=found.high,
            )
        )
    return judgements


def _images(
    config: RunConfig, data: TrainingData, half: int, num_images: int
) -> tuple[Tensor, Tensor | Captions]:
    """Return images in [-1, 1] of one half of those that are held out, and their labels."""
    dataset = data.open()
    batch = dataset.__getitems__(_chosen(config, len(dataset), half, num_images))
    return to_minus_one_one(batch.images), batch.labels


def _chosen(config: RunConfig, size: int, half: int, num_images: int) -> list[int]:
    """Return the indices of the images of one half of those that are held out of a dataset."""
    _, held_out = held_out_split(range(size), config.prune.held_out_share, config.seed)
    seed = derive_seed(config.seed, "schedule", half)
    return fixed_indices(halves(held_out)[half], num_images, seed)


@torch.inference_mode()
def _squared_errors(
    config: RunConfig,
    data: TrainingData,
    problem: Problem,
    wanted: BoolArray,
    half: int,
    num_images: int,
) -> FloatArray:
    """Measure networks at steps: the squared error of epsilon, of every image.

    All networks see the same images and, at a step, the same noise.

    Args:
        config: The run's settings.
        data: What its networks were trained on.
        problem: Networks and steps.
        wanted: ``(S, K)``: what is measured.
        half: Of the held-out images.
        num_images: Noised images at each step.

    Returns:
        ``(S, K, num_images)``; no number where nothing was measured.
    """
    schedule = noise_schedule(config.diffusion)
    x_0, labels = _images(config, data, half, num_images)
    errors = np.full((*wanted.shape, num_images), np.nan)
    for place, network in enumerate(problem.networks):
        if not wanted[:, place].any():
            continue
        logger.info("measuring %s at %d steps", network.name, wanted[:, place].sum())
        loaded = network.load()
        for step in np.flatnonzero(wanted[:, place]).tolist():
            timestep = problem.timesteps[step]
            generator = torch.Generator().manual_seed(
                derive_seed(config.seed, "schedule", half, timestep)
            )
            batch = NoisedBatch(
                x_0,
                torch.randn(x_0.shape, generator=generator),
                torch.full((num_images,), timestep),
                labels_for(loaded, labels),
            )
            errors[step, place] = _errors_of(loaded, batch, schedule)
    return errors


def _errors_of(network: Denoiser, batch: NoisedBatch, schedule: NoiseSchedule) -> FloatArray:
    """Compute the mean squared error of epsilon for every image of a batch: ``(B,)``."""
    schedule = schedule.to(network.device)
    errors = []
    for part in batch.split(max_batch_size(network)):
        moved = part.to(network.device)
        target = moved.target(schedule)
        predicted = moved.predict(network, schedule)[:, : target.shape[1]]
        squares = (predicted.float() - target).square().mean((1, 2, 3)).double()
        of_epsilon = schedule.prediction.per_epsilon(schedule.snr)[moved.timesteps]
        errors.append((of_epsilon * squares).cpu())
    return torch.cat(errors).numpy()

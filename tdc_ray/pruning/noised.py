"""The noised images on which scores, refits and losses rest: the same for all candidates."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import fixed_batches, held_out_split, to_model_range
from tdc_ray.data.latents import load_inputs
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.process import NoiseSchedule, loss_per_image, noise_schedule
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.precision import autocast
from tdc_ray.models.step import State, num_untouched, run
from tdc_ray.models.unet2d.steps import start, steps
from tdc_ray.seeds import derive_seed

Purpose = Literal["scores", "refit", "held-out"]


@dataclass(frozen=True, slots=True)
class NoisedBatch:
    """Images of a group's timesteps, and their noise."""

    x_0: Tensor
    """In [-1, 1], ``(B, C, H, W)``."""

    epsilon: Tensor
    """``(B, C, H, W)``"""

    timesteps: Tensor
    """``(B,)``"""

    labels: Tensor
    """Classes, ``(B,)``; heeded by UNets that are conditioned on them."""

    def split(self, size: int) -> Iterator["NoisedBatch"]:
        """Give its images in parts of at most so many."""
        tensors = (self.x_0, self.epsilon, self.timesteps, self.labels)
        parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
        return (NoisedBatch(*part) for part in parts)

    def start(self, unet: UNet2DModel, schedule: NoiseSchedule) -> State:
        """Give the state before the UNet's first step."""
        x_t = schedule.add_noise(self.x_0, self.epsilon, self.timesteps)
        return start(unet, x_t, schedule.model_timesteps(self.timesteps), self._labels(unet))

    def predict(self, unet: UNet2DModel, schedule: NoiseSchedule) -> Tensor:
        """Give the UNet's output, ``(B, C or 2C, H, W)``."""
        x_t = schedule.add_noise(self.x_0, self.epsilon, self.timesteps)
        timesteps = schedule.model_timesteps(self.timesteps)
        output: Tensor = unet(x_t, timesteps, class_labels=self._labels(unet)).sample
        return output

    def loss(self, prediction: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Give every image's training loss, ``(B,)``."""
        return loss_per_image(
            schedule,
            prediction,
            x_0=self.x_0,
            x_t=schedule.add_noise(self.x_0, self.epsilon, self.timesteps),
            epsilon=self.epsilon,
            timesteps=self.timesteps,
        )

    def _labels(self, unet: UNet2DModel) -> Tensor | None:
        return None if unet.class_embedding is None else self.labels


def noised_batches(
    config: RunConfig, group: TimestepGroup, unet: UNet2DModel, *, purpose: Purpose
) -> Iterator[NoisedBatch]:
    """Give noised images, the same ones at every call, in batches for a UNet, on its device.

    The timesteps are spread evenly over the group's. For ``held-out`` the images are those that no
    fine-tune sees (``prune.held_out_share``), for the other purposes they are the others.
    """
    prune, timesteps = config.prune, group.timesteps
    count = prune.num_refit_images if purpose == "refit" else prune.num_images
    seed = derive_seed(config.seed, purpose, group.first, group.last)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(count, generator=generator) * len(timesteps) // count
    dataset = load_inputs(config)
    rest, held_out = held_out_split(dataset, prune.held_out_share, config.seed)
    among = held_out if purpose == "held-out" else rest
    size, start = prune.batch_size or max_batch_size(unet), 0
    noise: Tensor | None = None
    for images, labels in fixed_batches(dataset, count, size, seed, among=among):
        x_0 = to_model_range(images)
        if noise is None:  # of all images, so that it does not depend on the batches
            noise = torch.randn((count, *x_0.shape[1:]), generator=generator)
        part = slice(start, start + len(x_0))
        start += len(x_0)
        tensors = (x_0, noise[part], timesteps.start + places[part], labels)
        yield NoisedBatch(*(tensor.to(unet.device) for tensor in tensors))


def first_images(batches: Iterable[NoisedBatch], count: int) -> NoisedBatch:
    """Join the first so many images of some batches, or all, into one batch."""
    found: list[NoisedBatch] = []
    for batch in batches:
        found.append(next(batch.split(count)))
        count -= len(batch.x_0)
        if count <= 0:
            break
    tensors = ((part.x_0, part.epsilon, part.timesteps, part.labels) for part in found)
    return NoisedBatch(*(torch.cat(parts) for parts in zip(*tensors, strict=True)))


@torch.inference_mode()
def held_out_losses(
    base: UNet2DModel, cuts: Sequence[UNet2DModel], config: RunConfig, group: TimestepGroup
) -> list[float]:
    """Give :func:`held_out_loss` of some cuts of a base: what stands before all cuts runs once."""
    schedule = noise_schedule(config.diffusion).to(base.device)
    own, all_steps = steps(base), [steps(unet.eval()) for unet in cuts]
    shared = min(num_untouched(own, found) for found in all_steps)
    losses: list[list[Tensor]] = [[] for _ in cuts]
    for batch in noised_batches(config, group, base, purpose="held-out"):
        with autocast(config.prune.precision, base.device):
            state = run(own[:shared], batch.start(base, schedule))
            outputs = [run(found[shared:], state).hidden.float() for found in all_steps]
        for output, of_cut in zip(outputs, losses, strict=True):
            of_cut.append(batch.loss(output, schedule))
    return [float(torch.cat(of_cut).double().mean()) for of_cut in losses]


def held_out_loss(unet: UNet2DModel, config: RunConfig, group: TimestepGroup) -> float:
    """Mean training loss on held-out images and noise of a group's timesteps."""
    (loss,) = held_out_losses(unet, [unet], config, group)
    return loss

"""The noised images on which scores, refits and losses rest: the same for all candidates."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import fixed_batches, held_out_split, to_minus_one_one
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule, noise_schedule
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.precision import autocast
from tdc_ray.models.step import State, num_untouched, run
from tdc_ray.models.unet2d.steps import start, steps
from tdc_ray.seeds import derive_seed

Purpose = Literal["scores", "refit", "held-out"]


def first_state(unet: UNet2DModel, batch: NoisedBatch, schedule: NoiseSchedule) -> State:
    """Return the state of a batch before the UNet's first step."""
    timesteps = schedule.model_timesteps(batch.timesteps)
    return start(unet, batch.x_t(schedule), timesteps, batch.labels)


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
    dataset = training_data(config.data, config.evaluate.cache_dir).open()
    rest, held_out = held_out_split(dataset, prune.held_out_share, config.seed)
    indices = held_out if purpose == "held-out" else rest
    size, start = prune.batch_size or max_batch_size(unet), 0
    noise: Tensor | None = None
    for images, labels in fixed_batches(dataset, count, size, seed, indices=indices):
        x_0 = to_minus_one_one(images)
        if noise is None:  # of all images, so that it does not depend on the batches
            noise = torch.randn((count, *x_0.shape[1:]), generator=generator)
        part = slice(start, start + len(x_0))
        start += len(x_0)
        tensors = [x_0, noise[part], timesteps.start + places[part]]
        if unet.class_embedding is not None:
            tensors.append(labels)
        yield NoisedBatch(*(tensor.to(unet.device) for tensor in tensors))


def first_images(batches: Iterable[NoisedBatch], count: int) -> NoisedBatch:
    """Join the first so many images of some batches, or all, into one batch."""
    found: list[NoisedBatch] = []
    for batch in batches:
        found.append(next(batch.split(count)))
        count -= len(batch.x_0)
        if count <= 0:
            break
    return NoisedBatch.join(found)


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
            state = run(own[:shared], first_state(base, batch, schedule))
            outputs = [run(found[shared:], state).hidden.float() for found in all_steps]
        for output, of_cut in zip(outputs, losses, strict=True):
            of_cut.append(loss_per_image(schedule, output, batch))
    return [float(torch.cat(of_cut).double().mean()) for of_cut in losses]


def held_out_loss(unet: UNet2DModel, config: RunConfig, group: TimestepGroup) -> float:
    """Mean training loss on held-out images and noise of a group's timesteps."""
    (loss,) = held_out_losses(unet, [unet], config, group)
    return loss

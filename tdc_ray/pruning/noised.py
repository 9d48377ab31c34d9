"""The noised images of scores, refits and losses: the same for all candidates.

Rounds choose by losses on images that fine-tunes may see, too, and noise of their own; finalists
are measured on held-out images and noise that no choice before theirs has seen.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdc_ray.config.train import Precision
from tdc_ray.data.batches import (
    fixed_batches,
    fixed_indices,
    halves,
    held_out_split,
    to_minus_one_one,
)
from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import captions_read, family_of, labels_for, steps_of
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.labels import map_labels
from tdc_ray.models.precision import autocast
from tdc_ray.models.step import State, num_untouched, run
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.spill import SpillBuffer
from tdc_ray.seeds import derive_seed

Purpose = Literal["scores", "refit", "choice", "held-out", "judge"]


def first_state(network: Denoiser, batch: NoisedBatch, schedule: NoiseSchedule) -> State:
    """Return the state of a batch before the network's first step.

    Raises:
        UnsupportedModelError: The network reads more of captions than the batch has.
    """
    given = batch.labels if isinstance(batch.labels, Mapping) else {}
    if missing := captions_read(network).keys() - given.keys():
        raise UnsupportedModelError(
            f"a {type(network).__name__} reads captions, and the images have none: "
            f"NoisedBatch.labels must have {', '.join(sorted(missing))}."
        )
    timesteps = schedule.model_timesteps(batch.timesteps)
    return family_of(network).start(network, batch.x_t(schedule), timesteps, batch.labels)


def noised_batches(
    context: PruningContext,
    group: TimestepGroup,
    network: Denoiser,
    *,
    purpose: Purpose,
    share: float = 1.0,
) -> Iterator[NoisedBatch]:
    """Yield noised images, the same ones at every call, in batches for a network, on its device.

    The timesteps are spread evenly over the group's. For ``held-out`` the images are half of those
    that no fine-tune sees (``prune.held_out_share``), for ``judge`` the other half, which no
    choice is made by. For the other purposes they are those that fine-tunes see.

    Args:
        context: The settings.
        group: The group.
        network: What they are for.
        purpose: What they are for; each has images and noise of its own.
        share: Share of the images to yield: the first of them.
    """
    prune, timesteps = context.prune, group.timesteps
    count = prune.num_refit_images if purpose == "refit" else prune.num_images
    seed = _seed(context, group, purpose)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randperm(count, generator=generator) * len(timesteps) // count
    dataset, indices = context.data.open(), _images(context, purpose)
    size, start = prune.batch_size or max_batch_size(network), 0
    noise: Tensor | None = None
    buffer = SpillBuffer()  # what a caption is takes megabytes
    few = max(1, round(share * count))
    for images, labels in fixed_batches(dataset, few, size, seed, indices=indices):
        x_0 = to_minus_one_one(images)
        if noise is None:  # for all images at once, so that it does not depend on the batches
            noise = torch.randn((count, *x_0.shape[1:]), generator=generator)
        part = slice(start, start + len(x_0))
        start += len(x_0)
        wanted = labels_for(network, labels)
        if network.device.type == "cpu":
            wanted = map_labels(buffer.keep_tensor, wanted)
        batch = NoisedBatch(x_0, noise[part], timesteps.start + offsets[part], wanted)
        yield batch.to(network.device)


def noised_indices(
    context: PruningContext, group: TimestepGroup, *, purpose: Purpose, count: int
) -> list[int]:
    """Return the index of the image behind each of the first noised images for a purpose."""
    seed = _seed(context, group, purpose)
    return fixed_indices(_images(context, purpose), count, seed)


def _seed(context: PruningContext, group: TimestepGroup, purpose: Purpose) -> int:
    return derive_seed(context.seed, purpose, group.first, group.last)


def _images(context: PruningContext, purpose: Purpose) -> Sequence[int]:
    """Return the indices of the images that there are for a purpose."""
    dataset = context.data.open()
    rest, held_out = held_out_split(dataset, context.prune.held_out_share, context.seed)
    chosen_by, judged_by = halves(held_out)
    return {"held-out": chosen_by, "judge": judged_by}.get(purpose, rest)


def first_images(batches: Iterable[NoisedBatch], count: int) -> NoisedBatch:
    """Concatenate the first so many images of some batches, or all, into one batch."""
    parts: list[NoisedBatch] = []
    for batch in batches:
        parts.append(next(batch.split(count)))
        count -= len(batch.x_0)
        if count <= 0:
            break
    return NoisedBatch.join(parts)


@dataclass(frozen=True, slots=True)
class PerImage:
    """What networks did with the same noised images."""

    losses: list[Tensor]
    """For each network the training loss of every image, ``(B,)``, float64."""

    distances: list[Tensor]
    """The mean square of how far its prediction is from that of the first, ``(B,)``, float64."""


@torch.inference_mode()
def run_all(
    networks: Sequence[Denoiser],
    batches: Iterable[NoisedBatch],
    schedule: NoiseSchedule,
    precision: Precision,
) -> PerImage:
    """Run a base and pruned models; steps before all pruned units run once.

    Args:
        networks: The base, then models that were pruned from it.
        batches: Noised images.
        schedule: The noise schedule, on the device of the networks.
        precision: Of the forward passes.
    """
    base, all_steps = networks[0], [steps_of(network.eval()) for network in networks]
    shared = min(num_untouched(all_steps[0], steps) for steps in all_steps)
    losses: list[list[Tensor]] = [[] for _ in networks]
    distances: list[list[Tensor]] = [[] for _ in networks]
    for batch in batches:
        with autocast(precision, base.device):
            state = run(all_steps[0][:shared], first_state(base, batch, schedule))
            outputs = [run(steps[shared:], state).hidden.float() for steps in all_steps]
        channels = batch.x_0.shape[1]  # those of variances, if it has them, come behind
        for number, output in enumerate(outputs):
            losses[number].append(loss_per_image(schedule, output, batch).double())
            apart = (output - outputs[0])[:, :channels]
            distances[number].append(apart.square().flatten(1).mean(1).double())
    return PerImage([*map(torch.cat, losses)], [*map(torch.cat, distances)])


def held_out_loss(
    network: Denoiser, context: PruningContext, group: TimestepGroup, schedule: NoiseSchedule
) -> float:
    """Compute the mean training loss on held-out images and noise of a group's timesteps."""
    batches = noised_batches(context, group, network, purpose="held-out")
    return float(run_all([network], batches, schedule, context.prune.precision).losses[0].mean())

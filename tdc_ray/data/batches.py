"""Batches of images in an order that only the seed and the step decide."""

from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms

from tdc_ray.config.data import DataConfig
from tdc_ray.config.prune import PruneConfig
from tdc_ray.data.dataset import ImageBatch, ImageDataset
from tdc_ray.seeds import derive_seed


def to_minus_one_one(images: Tensor) -> Tensor:
    """Convert uint8 images to [-1, 1], float32; latents, which are float32, stay as they are."""
    if images.is_floating_point():
        return images
    return images.float().div_(127.5).sub_(1.0)


def augment(images: Tensor, config: DataConfig, generator: torch.Generator) -> Tensor:
    """Flip and crop a batch ``(B, C, H, W)`` at random, by the config's flags."""
    if config.horizontal_flip:
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if config.crop_padding:
        padding, (height, width) = config.crop_padding, images.shape[-2:]
        padded = transforms.pad(images, [padding], padding_mode="reflect")
        corners = torch.randint(0, 2 * padding + 1, (len(images), 2), generator=generator)
        images = torch.stack(
            [
                image[:, top : top + height, left : left + width]
                for image, (top, left) in zip(padded, corners.tolist(), strict=True)
            ]
        )
    return images


def held_out_split(dataset: Sized, share: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Split the indices of a dataset's images at random: the rest, and a share that is held out.

    Either part has at least one image; a dataset of one image is in both. The indices come as
    arrays: lists of a million would take 50 MB in every process.
    """
    order = _permutation(len(dataset), derive_seed(seed, "held-out"), 0)
    indices = array("q", order.numpy().tobytes())
    count = max(1, round(share * len(indices)))
    return indices[count:] or indices, indices[:count]


def base_indices(dataset: Sized, prune: PruneConfig, seed: int) -> Sequence[int] | None:
    """Return the indices of the images that stage 1 trains on; None means all."""
    if not prune.held_out_of_base:
        return None
    rest, _ = held_out_split(dataset, prune.held_out_share, seed)
    return rest


LEAST_HELD_OUT = 4
"""Images that losses are compared on, at least: each of the `halves` has two, for an interval."""


def halves(held_out: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Split the images that are held out in two: one half to choose by, one to judge by.

    What a search measures on the first half decides which models there are; the second half has no
    part in that, so losses on it are not better for having been chosen. One image is in both.
    """
    middle = -(-len(held_out) // 2)
    return held_out[:middle], held_out[middle:] or held_out


def batches(
    dataset: ImageDataset,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[ImageBatch]:
    """Yield one rank's share of the batches of steps ``start_step`` to ``num_steps - 1``.

    Each epoch shuffles the images anew; without ``indices`` all of them are used. What a step sees
    depends on nothing but the seed and the step, so training can resume anywhere.
    """
    allowed = range(len(dataset)) if indices is None else indices
    share = batch_size // world_size
    firsts = (step * batch_size + rank * share for step in range(start_step, num_steps))
    loader: DataLoader[ImageBatch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # a dataset for __getitems__ alone
        batch_sampler=_shuffled(allowed, seed, (range(first, first + share) for first in firsts)),
        num_workers=num_workers,
        collate_fn=identity_collate,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


def fixed_batches(
    dataset: ImageDataset,
    count: int,
    batch_size: int,
    seed: int,
    *,
    indices: Sequence[int] | None = None,
) -> Iterator[ImageBatch]:
    """Yield ``count`` images, the same ones for the same seed; repeated where there are fewer.

    They are those of ``indices``, or any.
    """
    chosen = fixed_indices(range(len(dataset)) if indices is None else indices, count, seed)
    for start in range(0, count, batch_size):
        yield dataset.__getitems__(chosen[start : start + batch_size])


def fixed_indices(allowed: Sequence[int], count: int, seed: int) -> list[int]:
    """Return the indices of the images that :func:`fixed_batches` yields."""
    num_epochs = -(-count // len(allowed))
    order = torch.cat([_permutation(len(allowed), seed, epoch) for epoch in range(num_epochs)])
    return [allowed[position] for position in order[:count].tolist()]


def _shuffled(indices: Sequence[int], seed: int, batches: Iterable[range]) -> Iterator[list[int]]:
    """Yield the indices at each batch's positions, counted through epochs of other orders."""
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    for positions in batches:
        batch = []
        for position in positions:
            if position // len(indices) != epoch:
                epoch = position // len(indices)
                order = _permutation(len(indices), seed, epoch)
            batch.append(indices[int(order[position % len(indices)])])
        yield batch


def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(length, generator=generator)


def identity_collate(batch: Any) -> Any:
    """Return what ``__getitems__`` returned, which is a batch already; workers pickle it."""
    return batch

"""Batches of images in an order that only the seed and the step decide."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms

from tdc_ray.datasets import Batch, ImageDataset
from tdc_ray.seeds import derive_seed
from tdc_ray.settings import DataConfig


def to_model_range(images: Tensor) -> Tensor:
    """Bring uint8 images to [-1, 1], float32."""
    return images.float().div_(127.5).sub_(1.0)


def augment(images: Tensor, config: DataConfig, generator: torch.Generator) -> Tensor:
    """Flip and crop a batch ``(B, C, H, W)`` at random, by the config's flags."""
    if config.horizontal_flip:
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if config.crop_padding:
        padding, size = config.crop_padding, images.shape[-1]
        padded = transforms.pad(images, [padding], padding_mode="reflect")
        corners = torch.randint(0, 2 * padding + 1, (len(images), 2), generator=generator)
        images = torch.stack(
            [
                image[:, top : top + size, left : left + size]
                for image, (top, left) in zip(padded, corners.tolist(), strict=True)
            ]
        )
    return images


def batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Give one rank's share of the batches of steps ``start_step`` to ``num_steps - 1``.

    Images come epoch after epoch, each epoch in an order of its own. What a step sees depends on
    nothing but the seed and the step, so training can go on anywhere.
    """
    order = _StepOrder(
        len(dataset), batch_size, seed, range(start_step, num_steps), rank, world_size
    )
    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # a dataset for __getitems__ alone
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


def fixed_batches(
    dataset: ImageDataset, count: int, batch_size: int, seed: int
) -> Iterator[Batch]:
    """Give ``count`` images, the same ones for the same seed; over again where there are fewer."""
    chosen = torch.cat(
        [_permutation(len(dataset), seed, epoch) for epoch in range(-(-count // len(dataset)))]
    )[:count].tolist()
    for start in range(0, count, batch_size):
        yield dataset.__getitems__(chosen[start : start + batch_size])


class _StepOrder:
    """Indices of one rank's share of every step's batch."""

    def __init__(
        self, num_images: int, batch_size: int, seed: int, steps: range, rank: int, world_size: int
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.steps, self.rank, self.world_size = steps, rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in self.steps:
            first = step * self.batch_size + self.rank * share
            indices: list[int] = []
            for position in range(first, first + share):
                if position // self.num_images != epoch:
                    epoch = position // self.num_images
                    order = _permutation(self.num_images, self.seed, epoch)
                indices.append(int(order[position % self.num_images]))
            yield indices


def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(length, generator=generator)


def _as_is(batch: Any) -> Any:
    """Take what ``__getitems__`` gave for the batch that it is."""
    return batch

"""What a dataset is: images that are fetched by their indices, with labels."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tdc_ray.models.labels import Captions


class ImageBatch(NamedTuple):
    """Some images and their labels; a tuple, which a DataLoader can pin in memory."""

    images: Tensor
    """uint8 images, or float32 latents, ``(B, C, H, W)``."""

    labels: Tensor | Captions
    """int64 ``(B,)``, -1 where there are none; or what a network reads of captions."""


class ImageDataset(Protocol):
    """Images that can be fetched by their indices."""

    num_classes: int | None
    """Number of classes of the labels; None means no labels, or not for all images."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        """Fetch a batch; torch's DataLoader calls this with all indices at once."""
        ...

    def fingerprint(self) -> str:
        """Return a name for the content: equal content has an equal name."""
        ...


class ArrayImages:
    """Images held in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        """Wrap uint8 images ``(N, C, H, W)`` and int64 labels ``(N,)``."""
        self.images = images
        self.num_classes = None if labels is None else int(labels.max()) + 1
        self.labels = torch.full((len(images),), -1) if labels is None else labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        chosen = torch.as_tensor(indices)
        return ImageBatch(self.images[chosen], self.labels[chosen])

    def fingerprint(self) -> str:
        """Hash shape, pixels and labels."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]

"""What networks are conditioned on: classes, or what text encoders make of captions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdc_ray.models.network_config import STATES

ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
"""Arguments that diffusers' networks take within ``added_cond_kwargs``."""

Captions = Mapping[str, Tensor]
"""What a network reads of captions, or prompts: one row for each, float32, by the names of its
arguments (``structure.caption_shapes``)."""

Labels = Tensor | Captions | None
"""What a network is conditioned on: classes, int64, ``(B,)``, or captions; None for nothing."""


@dataclass(frozen=True, slots=True)
class CaptionDropout:
    """Which share of captions is replaced while training, and by what (arXiv:2207.12598)."""

    share: float
    empty: Captions
    """What a network reads of the empty prompt: without batch."""

    def apply(self, captions: Captions, generator: torch.Generator) -> Captions:
        """Replace some captions, drawn at random."""
        dropped = torch.rand(len(captions[STATES]), generator=generator) < self.share
        return {
            name: torch.where(dropped.view(-1, *[1] * (tensor.ndim - 1)), self.empty[name], tensor)
            for name, tensor in captions.items()
        }


def conditions(labels: Labels) -> dict[str, Any]:
    """Return what a network is called with beside images and timesteps."""
    if labels is None:
        return {}
    if isinstance(labels, Tensor):
        return {"class_labels": labels}
    added = {name: labels[name] for name in ADDED if name in labels}
    own = {name: tensor for name, tensor in labels.items() if name not in added}
    return {**own, "added_cond_kwargs": added} if added else own


def map_labels(function: Callable[[Tensor], Tensor], labels: Labels) -> Labels:
    """Apply a function to each of the tensors."""
    if labels is None or isinstance(labels, Tensor):
        return None if labels is None else function(labels)
    return map_captions(function, labels)


def map_captions(function: Callable[[Tensor], Tensor], captions: Captions) -> Captions:
    """Apply a function to each of the tensors."""
    return {name: function(tensor) for name, tensor in captions.items()}


def join_labels(parts: Sequence[Labels]) -> Labels:
    """Concatenate the labels of batches; all are of one kind."""
    if captions := [part for part in parts if isinstance(part, Mapping)]:
        return join_captions(captions)
    classes = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(classes) if classes else None


def join_captions(parts: Sequence[Captions]) -> Captions:
    """Concatenate captions that have the same names."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

"""What networks that are conditioned on text read of captions, or prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Captions:
    """What text encoders output for the captions of a batch."""

    states: Tensor
    """Of each token, ``(B, S, C)``."""

    pooled: Tensor | None = None
    """Of each caption as a whole, ``(B, P)``; None for networks that do not read it."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Captions":
        """Apply a function to each of the tensors."""
        pooled = None if self.pooled is None else function(self.pooled)
        return Captions(function(self.states), pooled)

    @staticmethod
    def join(parts: Sequence["Captions"]) -> "Captions":
        """Concatenate batches of as many tokens; all have pooled ones, or none has."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        states = torch.cat([part.states for part in parts])
        return Captions(states, torch.cat(pooled) if pooled else None)

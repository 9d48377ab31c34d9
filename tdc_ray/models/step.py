"""A network as a sequence of steps, so that a pruned one can be run from where it differs."""

from dataclasses import dataclass

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class State:
    """What flows between two steps, for one batch."""

    hidden: Tensor
    """``(B, C, H, W)``"""

    embedding: Tensor
    """Of timestep and class, ``(B, E)``."""

    skips: tuple[Tensor, ...] = ()
    """Outputs of the way down that the way up has not read yet."""


@dataclass(frozen=True, slots=True)
class Step:
    """One residual block, attention or sampler, or the convolutions at both ends."""

    name: str
    """Dotted name of the module in the ``UNet2DModel``."""

    module: nn.Module
    reads_skip: bool = False
    """The last skip is concatenated to its input."""

    leaves_skip: bool = False
    """Its output is a skip."""

    def __call__(self, state: State) -> State:
        """Run the step."""
        hidden, skips = state.hidden, state.skips
        if self.reads_skip:
            hidden, skips = torch.cat([hidden, skips[-1]], dim=1), skips[:-1]
        if isinstance(self.module, ResnetBlock2D):
            hidden = self.module(hidden, state.embedding)
        else:
            hidden = self.module(hidden)
        if self.leaves_skip:
            skips = (*skips, hidden)
        return State(hidden, state.embedding, skips)

"""A network as a sequence of steps, so that a pruned one can be run from where it differs."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

Stream = Literal["hidden", "context"]
"""A field of :class:`State` that steps add to."""


@dataclass(frozen=True, slots=True)
class State:
    """What flows between two steps, for one batch."""

    hidden: Tensor
    """``(B, C, H, W)``; a transformer's patches lie where they are in the image."""

    embedding: Tensor
    """Embedding of timestep and class, ``(B, E)``; where every block has one, ``(B, L, E)``."""

    skips: tuple[Tensor, ...] = ()
    """Outputs of the encoder that the decoder has not read yet."""

    context: Tensor | None = None
    """What cross-attentions read, such as states of a caption, and joint attentions change:
    ``(B, S, C)``."""

    context_bias: Tensor | None = None
    """Added to the scores of cross-attentions, ``(B, 1, S)``; None means nothing."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The layers at both ends of a network."""

    first: nn.Conv2d | nn.Linear
    last_norm: nn.GroupNorm | nn.LayerNorm | None
    last: nn.Conv2d | nn.Linear
    """A convolution has an output for each channel, a linear layer for each pixel of a patch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One residual block, attention, feed-forward or sampler, or the layers at both ends."""

    name: str
    """Dotted name of the module in the network."""

    module: nn.Module

    output_layers: Mapping[Stream, str]
    """By the streams that it adds to, the name within the module of the layer whose output is
    added, or is the step's output."""

    residual_scale: float = 1.0
    """What the sum of the output layer and the shortcut is divided by."""

    reads_embedding: bool = False
    reads_skip: bool = False
    """The last skip is concatenated to its input."""

    leaves_skip: bool = False
    """Its output is a skip."""

    def __call__(self, state: State) -> State:
        """Run the step."""
        hidden, skips = state.hidden, state.skips
        if self.reads_skip:
            hidden, skips = torch.cat([hidden, skips[-1]], dim=1), skips[:-1]
        if self.reads_embedding:
            hidden = self.module(hidden, state.embedding)
        else:
            hidden = self.module(hidden)
        if self.leaves_skip:
            skips = (*skips, hidden)
        return replace(state, hidden=hidden, skips=skips)

    def key(self, stream: Stream) -> str:
        """Return a name of its output to a stream: to ``hidden`` that of the step."""
        return self.name if stream == "hidden" else f"{self.name}|{stream}"

    def gate(self, state: State, stream: Stream) -> Tensor | None:
        """Return what an output layer's channels are multiplied with, ``(B, C)``, if anything."""
        del state, stream
        return None

    def in_layer(self, values: Tensor, stream: Stream) -> Tensor:
        """Bring a difference of a stream behind the step into the layout of its output layer's."""
        missing = values * self.residual_scale
        layer = self.module.get_submodule(self.output_layers[stream])
        if stream == "hidden" and isinstance(layer, nn.Linear):
            missing = missing.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
        return missing


def run(steps: Sequence[Step], state: State) -> State:
    """Run steps, one after the other."""
    for step in steps:
        state = step(state)
    return state


def num_untouched(base: Sequence[Step], pruned: Sequence[Step]) -> int:
    """Count the steps before the first pruned one: they equal the base's."""
    pairs = zip(base, pruned, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: not is_cut(*pair), pairs))


def is_cut(base: Step, step: Step) -> bool:
    """Whether a step has fewer channels than the base's, or was removed."""
    shapes, others = ([p.shape for p in one.module.parameters()] for one in (base, step))
    return shapes != others

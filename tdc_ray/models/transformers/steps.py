"""The forward pass of transformers with adaptive norms as steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from tdc_ray.models.step import State, Step, Stream

Modulation = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the embeddings of a batch, ``(B, L, E)``: shift, scale and gate, each ``(B, C)``."""


def to_tokens(hidden: Tensor) -> Tensor:
    """Bring ``(B, C, h, w)`` to ``(B, h * w, C)``."""
    return hidden.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """Bring ``(B, h * w, C)`` to ``(B, C, h, w)``."""
    grid: Tensor = tokens.transpose(1, 2).unflatten(2, (height, width))
    return grid


def adaptive(norm: nn.Module, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalize tokens ``(B, N, C)``, then scale and shift their channels, ``(B, C)``."""
    normed: Tensor = norm(tokens) * (1 + scale[:, None]) + shift[:, None]
    return normed


def modulation_of(layer: nn.Linear, part: int, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return shift, scale and gate of a part of a block by the layer of its adaptive norm.

    Args:
        layer: Its outputs are shifts, scales and gates of one part after the other.
        part: Which one.
        embedding: ``(B, E)``
    """
    rows = slice(3 * part * layer.in_features, 3 * (part + 1) * layer.in_features)
    shift, scale, gate = functional.linear(
        functional.silu(embedding), layer.weight[rows], layer.bias[rows]
    ).chunk(3, dim=1)
    return shift, scale, gate


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedStep(Step):
    """An attention or a feed-forward behind a norm that is scaled and shifted, and its gate."""

    norm: nn.Module
    modulation: Modulation

    def __call__(self, state: State) -> State:
        """Run the step."""
        shift, scale, gate = self.modulation(state.embedding)
        (stream,) = self.output_layers
        tokens = state.context if stream == "context" else to_tokens(state.hidden)
        assert tokens is not None
        tokens = gate[:, None] * self.module(adaptive(self.norm, tokens, shift, scale)) + tokens
        if stream == "context":
            return replace(state, context=tokens)
        return replace(state, hidden=to_grid(tokens, *state.hidden.shape[2:]))

    def gate(self, state: State, stream: Stream) -> Tensor:
        """Return what the output layer's channels are multiplied with, ``(B, C)``."""
        del stream
        return self.modulation(state.embedding)[2]


def gated_step(
    name: str,
    module: nn.Module,
    norm: nn.Module,
    modulation: Modulation,
    stream: Stream = "hidden",
) -> GatedStep:
    """Make the step of an ``Attention`` or a ``FeedForward`` of a stream."""
    layer = "to_out.0" if isinstance(module, Attention) else "net.2"
    return GatedStep(
        name=name,
        module=module,
        output_layers={stream: layer},
        norm=norm,
        modulation=modulation,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossStep(Step):
    """An attention to the context, without norm and gate."""

    def __call__(self, state: State) -> State:
        """Run the step."""
        tokens = to_tokens(state.hidden)
        context, bias = state.context, state.context_bias
        added = self.module(tokens, encoder_hidden_states=context, attention_mask=bias)
        tokens = added + tokens
        return replace(state, hidden=to_grid(tokens, *state.hidden.shape[2:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchStep(Step):
    """The embedding of patches and of where they are: the first step."""

    patch_size: int

    def __call__(self, state: State) -> State:
        """Run the step."""
        height, width = state.hidden.shape[2:]
        tokens = self.module(state.hidden)
        grid = to_grid(tokens, height // self.patch_size, width // self.patch_size)
        return replace(state, hidden=grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpatchStep(Step):
    """The last norm, which is scaled and shifted, and the linear layer to pixels of patches."""

    norm: nn.Module
    modulation: Callable[[Tensor], tuple[Tensor, Tensor]]
    patch_size: int

    def __call__(self, state: State) -> State:
        """Run the step."""
        tokens, size = to_tokens(state.hidden), self.patch_size
        normed = adaptive(self.norm, tokens, *self.modulation(state.embedding))
        patches = self.module(normed).unflatten(2, (size, size, -1))
        patches = patches.unflatten(1, state.hidden.shape[2:])  # (B, h, w, p, q, C)
        images = patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return replace(state, hidden=images)

    def in_layer(self, values: Tensor, stream: Stream) -> Tensor:
        """Bring ``(B, C, H, W)`` into the layout of the layer's output: ``(B, N, p * q * C)``."""
        del stream
        size = self.patch_size
        # (B, C, h, p, w, q)
        patches: Tensor = values.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def transformer_steps(
    network: Any,
    blocks: Sequence[Step],
    last: str,
    norm: nn.Module,
    modulation: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> list[Step]:
    """Put the steps of a transformer's blocks between those from and to patches.

    Args:
        network: The transformer.
        blocks: Steps of its blocks, in order.
        last: Name of the linear layer to pixels of patches.
        norm: Before that layer.
        modulation: Shift and scale between the two, of the embeddings of a batch.
    """
    size = network.config["patch_size"]
    first = PatchStep(
        name="pos_embed",
        module=network.pos_embed,
        output_layers={"hidden": "proj"},
        patch_size=size,
    )
    end = UnpatchStep(
        name=last,
        module=network.get_submodule(last),
        output_layers={"hidden": ""},
        norm=norm,
        modulation=modulation,
        patch_size=size,
    )
    return [first, *blocks, end]

"""The forward pass of transformers with adaptive norms as steps."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn
from torch.nn import functional

from tdc_ray.models.step import State, Step, Stream
from tdc_ray.models.transformers.transformer import Transformer

Modulation = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the embeddings of a batch, ``(B, L, E)``: shift, scale and gate, each ``(B, C)``."""

Shift = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The same without a gate."""


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


def shift_of(
    layer: nn.Linear, embedding: Tensor, *, scale_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Return shift and scale by a layer of an embedding, ``(B, E)``."""
    one, other = layer(functional.silu(embedding)).chunk(2, dim=1)
    return (other, one) if scale_first else (one, other)


def stacked(embeddings: Iterable[Tensor]) -> Tensor:
    """Stack embeddings ``(B, E)`` of several blocks: ``(B, L, E)``."""
    return torch.stack([*embeddings], dim=1)


def single_embedding(layer: nn.Module, timesteps: Tensor, size: Any, dtype: Any) -> Tensor:
    """Embed timesteps by an ``AdaLayerNormSingle``: six vectors for blocks, one for the end."""
    blocks, end = layer(timesteps, size, batch_size=len(timesteps), hidden_dtype=dtype)
    return torch.cat([blocks.unflatten(1, (6, -1)), end[:, None]], dim=1)


def single_shift(table: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and scale before the last layer, by a table, ``(2, C)``."""
    shift, scale = (table + embedding[:, 6:]).unbind(1)
    return shift, scale


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedStep(Step):
    """An attention or a feed-forward behind a norm that is scaled and shifted, and its gate."""

    norm: nn.Module
    modulation: Modulation
    on_grid: bool = False
    """Whether the module takes tokens as ``(B, C, h, w)``: it has convolutions."""

    def __call__(self, state: State) -> State:
        """Run the step."""
        shift, scale, gate = self.modulation(state.embedding)
        (stream,) = self.output_layers
        tokens = state.context if stream == "context" else to_tokens(state.hidden)
        assert tokens is not None
        tokens = (
            gate[:, None] * self._run(adaptive(self.norm, tokens, shift, scale), state) + tokens
        )
        if stream == "context":
            return replace(state, context=tokens)
        return replace(state, hidden=to_grid(tokens, *state.hidden.shape[2:]))

    def _run(self, tokens: Tensor, state: State) -> Tensor:
        """Run the module, if it convolves on the grid of tokens."""
        if not self.on_grid:
            output: Tensor = self.module(tokens)
            return output
        return to_tokens(self.module(to_grid(tokens, *state.hidden.shape[2:])))

    def gate(self, state: State, stream: Stream) -> Tensor:
        """Return what the output layer's channels are multiplied with, ``(B, C)``."""
        del stream
        return self.modulation(state.embedding)[2]


def is_removed(branch: nn.Module) -> bool:
    """Whether a branch of a block was removed (``models.transformers.remaining``)."""
    return isinstance(branch, nn.Identity)


def gated_step(
    name: str,
    module: nn.Module,
    norm: nn.Module,
    modulation: Modulation,
    stream: Stream = "hidden",
) -> Step:
    """Make the step of an ``Attention``, a ``FeedForward`` or a ``GLUMBConv`` of a stream."""
    if is_removed(module):
        return Step(name=name, module=module, output_layers={})
    on_grid = isinstance(module, GLUMBConv)
    layer = "to_out.0" if isinstance(module, Attention) else "conv_point" if on_grid else "net.2"
    return GatedStep(
        name=name,
        module=module,
        output_layers={stream: layer},
        norm=norm,
        modulation=modulation,
        on_grid=on_grid,
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
class JointStep(GatedStep):
    """An attention of image and context to both, each behind a norm and a gate of its own."""

    context_norm: nn.Module
    context_modulation: Callable[[Tensor], tuple[Tensor, ...]]
    """Shift and scale, and a gate where it adds to the context."""

    leaves_input: bool
    """A second attention reads its input, too, which waits as a skip."""

    def __call__(self, state: State) -> State:
        """Run the step."""
        shift, scale, gate = self.modulation(state.embedding)
        context_shift, context_scale, *context_gates = self.context_modulation(state.embedding)
        tokens, context = to_tokens(state.hidden), state.context
        assert context is not None
        added, added_to_context = self.module(
            adaptive(self.norm, tokens, shift, scale),
            adaptive(self.context_norm, context, context_shift, context_scale),
        )
        hidden = to_grid(gate[:, None] * added + tokens, *state.hidden.shape[2:])
        for context_gate in context_gates:
            context = context_gate[:, None] * added_to_context + context
        skips = (*state.skips, state.hidden) if self.leaves_input else state.skips
        return replace(state, hidden=hidden, context=context, skips=skips)

    def gate(self, state: State, stream: Stream) -> Tensor:
        """Return what the output layer's channels are multiplied with, ``(B, C)``."""
        modulation = self.modulation if stream == "hidden" else self.context_modulation
        return modulation(state.embedding)[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class DualStep(GatedStep):
    """A second attention of the image to itself, which reads what the joint one before it does."""

    def __call__(self, state: State) -> State:
        """Run the step."""
        shift, scale, gate = self.modulation(state.embedding)
        source = adaptive(self.norm, to_tokens(state.skips[-1]), shift, scale)
        tokens = gate[:, None] * self.module(source) + to_tokens(state.hidden)
        hidden = to_grid(tokens, *state.hidden.shape[2:])
        return replace(state, hidden=hidden, skips=state.skips[:-1])


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
    modulation: Shift
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


def dit_block(name: str, block: Any, index: int) -> list[Step]:
    """Split a block of attention and feed-forward whose adaptive norm is its own (adaLN-Zero).

    Args:
        name: Its dotted name.
        block: The block.
        index: Which of the embeddings is its own.
    """

    def gate(part: int) -> Modulation:
        return lambda embeddings: modulation_of(block.norm1.linear, part, embeddings[:, index])

    before_ff = int(not is_removed(block.attn1))  # what is removed has no part of the modulation
    return [
        gated_step(f"{name}.attn1", block.attn1, block.norm1.norm, gate(0)),
        gated_step(f"{name}.ff", block.ff, block.norm3, gate(before_ff)),
    ]


def single_blocks(network: Any) -> list[Step]:
    """Split blocks of attention, cross-attention and feed-forward with one adaptive norm."""
    return [
        step
        for index, block in enumerate(network.transformer_blocks)
        for step in single_block(f"transformer_blocks.{index}", block)
    ]


def single_block(name: str, block: Any) -> list[Step]:
    """Split such a block."""
    gate = partial(_single_modulation, block)
    outputs: dict[Stream, str] = {} if is_removed(block.attn2) else {"hidden": "to_out.0"}
    cross = CrossStep if outputs else Step
    return [
        gated_step(f"{name}.attn1", block.attn1, block.norm1, partial(gate, 0)),
        cross(name=f"{name}.attn2", module=block.attn2, output_layers=outputs),
        gated_step(f"{name}.ff", block.ff, block.norm2, partial(gate, 1)),
    ]


def _single_modulation(block: Any, part: int, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return shift, scale and gate of a block's attention (0) or feed-forward (1)."""
    all_six = block.scale_shift_table + embedding[:, :6]
    shift, scale, gate = all_six.chunk(2, dim=1)[part].unbind(1)
    return shift, scale, gate


def joint_block(name: str, block: Any) -> list[Step]:
    """Split a ``JointTransformerBlock``."""
    before_ff = int(not is_removed(block.attn))  # what is removed has no part of the modulation
    gate = partial(modulation_of, block.norm1.linear, before_ff)
    steps = [_joint_step(f"{name}.attn", block)]
    if block.use_dual_attention:
        part = before_ff + int(not is_removed(block.ff))
        steps.append(_dual_step(f"{name}.attn2", block, part))
    steps.append(gated_step(f"{name}.ff", block.ff, block.norm2, gate))
    if not block.context_pre_only:
        gate = partial(modulation_of, block.norm1_context.linear, before_ff)
        norm, layer = block.norm2_context, block.ff_context
        steps.append(gated_step(f"{name}.ff_context", layer, norm, gate, "context"))
    return steps


def _joint_step(name: str, block: Any) -> Step:
    """Make the step of the attention of both streams."""
    leaves_input = block.use_dual_attention and not is_removed(block.attn2)
    if is_removed(block.attn):
        return Step(name=name, module=block.attn, output_layers={}, leaves_skip=leaves_input)
    outputs: dict[Stream, str] = {"hidden": "to_out.0"}
    context: Callable[[Tensor], tuple[Tensor, ...]]
    if block.context_pre_only:
        context = partial(shift_of, block.norm1_context.linear, scale_first=True)
    else:
        outputs["context"] = "to_add_out"
        context = partial(modulation_of, block.norm1_context.linear, 0)
    return JointStep(
        name=name,
        module=block.attn,
        output_layers=outputs,
        norm=block.norm1.norm,
        modulation=partial(modulation_of, block.norm1.linear, 0),
        context_norm=block.norm1_context.norm,
        context_modulation=context,
        leaves_input=leaves_input,
    )


def _dual_step(name: str, block: Any, part: int) -> Step:
    """Make the step of the image's second attention, with a part of the block's modulation."""
    if is_removed(block.attn2):
        return Step(name=name, module=block.attn2, output_layers={})
    return DualStep(
        name=name,
        module=block.attn2,
        output_layers={"hidden": "to_out.0"},
        norm=block.norm1.norm,
        modulation=partial(modulation_of, block.norm1.linear, part),
    )


def transformer_steps(transformer: Transformer, network: Any) -> list[Step]:
    """Split the forward pass into steps; one after the other they return the network's output."""
    ends, size = transformer.ends, network.config["patch_size"]
    first = PatchStep(
        name=ends.patches,
        module=network.get_submodule(ends.patches),
        output_layers={"hidden": "proj"},
        patch_size=size,
    )
    last = UnpatchStep(
        name=ends.output,
        module=network.get_submodule(ends.output),
        output_layers={"hidden": ""},
        norm=network.get_submodule(ends.norm),
        modulation=transformer.last_shift(network),
        patch_size=size,
    )
    return [first, *transformer.blocks(network), last]

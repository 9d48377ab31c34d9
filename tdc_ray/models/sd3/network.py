"""Runs ``SD3Transformer2DModel`` as steps, on given states of captions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from tdc_ray.models.labels import Captions
from tdc_ray.models.network_config import STATES
from tdc_ray.models.step import Ends, State, Step, Stream
from tdc_ray.models.transformers.steps import (
    GatedStep,
    adaptive,
    gated_step,
    modulation_of,
    to_grid,
    to_tokens,
    transformer_steps,
)


def ends(sd3: SD3Transformer2DModel) -> Ends:
    """Return the layers at both ends."""
    return Ends(sd3.pos_embed.proj, sd3.norm_out.norm, sd3.proj_out)


def start(sd3: SD3Transformer2DModel, x_t: Tensor, timesteps: Tensor, captions: Captions) -> State:
    """Return the state before the first step."""
    embedding = sd3.time_text_embed(timesteps, captions["pooled_projections"])
    return State(x_t, embedding, context=sd3.context_embedder(captions[STATES]))


def steps(sd3: SD3Transformer2DModel) -> list[Step]:
    """Split the forward pass into steps; one after the other they return the network's output."""
    blocks: list[Step] = []
    for index, block in enumerate(sd3.transformer_blocks):
        name = f"transformer_blocks.{index}"
        image = partial(modulation_of, block.norm1.linear)
        outputs: dict[Stream, str] = {"hidden": "to_out.0"}
        context: Callable[[Tensor], tuple[Tensor, ...]]
        if block.context_pre_only:
            context = partial(_shift_and_scale, block.norm1_context.linear)
        else:
            outputs["context"] = "to_add_out"
            context = partial(modulation_of, block.norm1_context.linear, 0)
        joint = JointStep(
            name=f"{name}.attn",
            module=block.attn,
            output_layers=outputs,
            norm=block.norm1.norm,
            modulation=partial(image, 0),
            context_norm=block.norm1_context.norm,
            context_modulation=context,
            leaves_input=block.use_dual_attention,
        )
        blocks.append(joint)
        if block.use_dual_attention:
            dual = DualStep(
                name=f"{name}.attn2",
                module=block.attn2,
                output_layers={"hidden": "to_out.0"},
                norm=block.norm1.norm,
                modulation=partial(image, 2),
            )
            blocks.append(dual)
        blocks.append(gated_step(f"{name}.ff", block.ff, block.norm2, partial(image, 1)))
        if not block.context_pre_only:
            gate = partial(modulation_of, block.norm1_context.linear, 1)
            norm, layer = block.norm2_context, block.ff_context
            blocks.append(gated_step(f"{name}.ff_context", layer, norm, gate, "context"))
    modulation = partial(_shift_and_scale, sd3.norm_out.linear)
    return transformer_steps(sd3, blocks, "proj_out", sd3.norm_out.norm, modulation)


def _shift_and_scale(layer: nn.Linear, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and scale where there is no gate: these have the other order."""
    scale, shift = layer(functional.silu(embedding)).chunk(2, dim=1)
    return shift, scale


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

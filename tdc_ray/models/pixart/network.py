"""Runs ``PixArtTransformer2DModel`` as steps, on given states of captions."""

from functools import partial

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from tdc_ray.models.labels import Captions
from tdc_ray.models.network_config import STATES
from tdc_ray.models.step import Ends, State, Step
from tdc_ray.models.transformers.steps import CrossStep, gated_step, transformer_steps

MASKED = -10000.0
"""What is added to the scores of tokens that do not count, as diffusers does."""


def ends(pixart: PixArtTransformer2DModel) -> Ends:
    """Return the layers at both ends."""
    return Ends(pixart.pos_embed.proj, pixart.norm_out, pixart.proj_out)


def start(
    pixart: PixArtTransformer2DModel, x_t: Tensor, timesteps: Tensor, captions: Captions
) -> State:
    """Return the state before the first step."""
    count = len(x_t)
    sizes = {name: captions.get(name) for name in ("resolution", "aspect_ratio")}
    blocks, end = pixart.adaln_single(
        timesteps, sizes, batch_size=count, hidden_dtype=pixart.dtype
    )
    embedding = torch.cat([blocks.unflatten(1, (6, -1)), end[:, None]], dim=1)
    context = captions[STATES]
    if pixart.caption_projection is not None:
        context = pixart.caption_projection(context)
    mask = captions["encoder_attention_mask"].to(x_t.dtype)
    return State(x_t, embedding, context=context, context_bias=MASKED * (1 - mask[:, None]))


def steps(pixart: PixArtTransformer2DModel) -> list[Step]:
    """Split the forward pass into steps; one after the other they return the network's output."""
    blocks: list[Step] = []
    for index, block in enumerate(pixart.transformer_blocks):
        name, gate = f"transformer_blocks.{index}", partial(_modulation, block.scale_shift_table)
        blocks += [
            gated_step(f"{name}.attn1", block.attn1, block.norm1, partial(gate, 0)),
            CrossStep(
                name=f"{name}.attn2", module=block.attn2, output_layers={"hidden": "to_out.0"}
            ),
            gated_step(f"{name}.ff", block.ff, block.norm2, partial(gate, 1)),
        ]
    modulation = partial(_end_modulation, pixart.scale_shift_table)
    return transformer_steps(pixart, blocks, "proj_out", pixart.norm_out, modulation)


def _modulation(table: Tensor, half: int, embedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return shift, scale and gate of a block's attention (0) or feed-forward (1)."""
    shift, scale, gate = (table + embedding[:, :6]).chunk(2, dim=1)[half].unbind(1)
    return shift, scale, gate


def _end_modulation(table: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and scale before the last layer."""
    shift, scale = (table + embedding[:, 6:]).unbind(1)
    return shift, scale

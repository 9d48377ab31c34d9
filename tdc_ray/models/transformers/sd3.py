"""``SD3Transformer2DModel`` (arXiv:2403.03206): attentions of image and caption to both."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tdc_ray.models.config_types import Size, Width
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.network_config import STATES, CaptionShapes
from tdc_ray.models.transformers.layers import (
    attention_layers,
    attention_unit,
    block_names,
    embedder_layers,
    feed_forward_layers,
    feed_forward_unit,
    joint_attention_layers,
    linear,
    output_layer,
    patch_layer,
    two_linear,
)
from tdc_ray.models.transformers.settings import TransformerSettings
from tdc_ray.models.transformers.transformer import Ends, Transformer
from tdc_ray.models.units import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from tdc_ray.models.labels import Captions
    from tdc_ray.models.step import Step
    from tdc_ray.models.transformers.steps import Shift

CAPTION_TOKENS = 333
"""Tokens of a caption that macs are counted for, as diffusers' pipeline makes them: CLIP's 77 and
T5's 256."""


class SD3Settings(TransformerSettings):
    """The arguments of ``diffusers.SD3Transformer2DModel``, with its defaults."""

    sample_size: Size = 128
    in_channels: Width = 16
    num_layers: Annotated[int, Field(ge=1, le=256)] = 18
    attention_head_dim: Width = 64
    num_attention_heads: Annotated[int, Field(ge=1, le=256)] = 18
    joint_attention_dim: Width = 4096
    caption_projection_dim: Width = 1152
    pooled_projection_dim: Width = 2048
    out_channels: Width | None = 16
    pos_embed_max_size: Size = 96
    dual_attention_layers: list[int] | tuple[int, ...] = ()
    qk_norm: Literal["rms_norm"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim must be num_attention_heads times attention_head_dim, "
                f"{self.width}, got {self.caption_projection_dim}"
            )
        if self.sample_size > self.pos_embed_max_size * self.patch_size:
            raise ValueError(
                f"sample_size must be at most pos_embed_max_size times patch_size, "
                f"{self.pos_embed_max_size * self.patch_size}, got {self.sample_size}"
            )
        return self


def _units(sd3: SD3Settings) -> Iterator[Unit]:
    """Yield every attention's heads, of image and caption together, and both feed-forwards."""
    heads, tokens = (sd3.num_attention_heads, sd3.attention_head_dim), sd3.tokens
    last = sd3.num_layers - 1
    for index, block in enumerate(block_names(sd3)):
        both = tokens if index == last else tokens + CAPTION_TOKENS
        yield attention_unit(f"{block}.attn", *heads, both)
        if index in sd3.dual_attention_layers:
            yield attention_unit(f"{block}.attn2", *heads, tokens)
        yield feed_forward_unit(f"{block}.ff", 4 * sd3.width, tokens)
        if index < last:
            yield feed_forward_unit(f"{block}.ff_context", 4 * sd3.width, CAPTION_TOKENS)


def _layers(sd3: SD3Settings, units: Mapping[str, Unit]) -> Iterator[Layer]:
    width, stream, embed = sd3.width, Channels(sd3.width), "time_text_embed"
    yield patch_layer("pos_embed", sd3)
    yield from embedder_layers(f"{embed}.timestep_embedder", width)
    yield from two_linear(f"{embed}.text_embedder", Channels(sd3.pooled_projection_dim), stream)
    states = Channels(sd3.joint_attention_dim)
    yield linear("context_embedder", states, stream, tokens=CAPTION_TOKENS)
    for block in block_names(sd3):
        second, of_caption = units.get(f"{block}.attn2"), units.get(f"{block}.ff_context")
        yield linear(f"{block}.norm1.linear", stream, Channels((9 if second else 6) * width))
        modulation = Channels((6 if of_caption else 2) * width)
        yield linear(f"{block}.norm1_context.linear", stream, modulation)
        heads, normed = units[f"{block}.attn"], sd3.qk_norm is not None
        yield from joint_attention_layers(
            heads, stream, (sd3.tokens, CAPTION_TOKENS), has_norms=normed, is_last=not of_caption
        )
        if second is not None:
            yield from attention_layers(second, stream, has_bias=True, has_norms=normed)
        for unit in (units[f"{block}.ff"], of_caption):
            if unit is not None:
                yield from feed_forward_layers(unit, stream, "gelu-approximate")
    yield linear("norm_out.linear", stream, Channels(2 * width))
    yield output_layer("proj_out", sd3)


def _captions(sd3: SD3Settings) -> CaptionShapes:
    states = (CAPTION_TOKENS, sd3.joint_attention_dim)
    return {STATES: states, "pooled_projections": (sd3.pooled_projection_dim,)}


def _embed(
    sd3: Any, x_t: "Tensor", timesteps: "Tensor", captions: "Captions"
) -> "tuple[Tensor, Tensor]":
    del x_t
    embedding = sd3.time_text_embed(timesteps, captions["pooled_projections"])
    return embedding, sd3.context_embedder(captions[STATES])


def _blocks(sd3: Any) -> "Sequence[Step]":
    from tdc_ray.models.transformers.steps import dual_step, gated_step, joint_step, modulation_of

    steps: list[Step] = []
    for index, block in enumerate(sd3.transformer_blocks):
        name, gate = f"transformer_blocks.{index}", partial(modulation_of, block.norm1.linear, 1)
        steps.append(joint_step(f"{name}.attn", block))
        if block.use_dual_attention:
            steps.append(dual_step(f"{name}.attn2", block))
        steps.append(gated_step(f"{name}.ff", block.ff, block.norm2, gate))
        if not block.context_pre_only:
            gate = partial(modulation_of, block.norm1_context.linear, 1)
            norm, layer = block.norm2_context, block.ff_context
            steps.append(gated_step(f"{name}.ff_context", layer, norm, gate, "context"))
    return steps


def _last_shift(sd3: Any) -> "Shift":
    from tdc_ray.models.transformers.steps import shift_of

    return partial(shift_of, sd3.norm_out.linear, scale_first=True)


SD3 = Transformer(
    name="SD3Transformer2DModel",
    settings_of=SD3Settings.of,
    units=_units,
    layers=_layers,
    ends=Ends("pos_embed", "norm_out.norm", "proj_out"),
    embed=_embed,
    blocks=_blocks,
    last_shift=_last_shift,
    captions=_captions,
)

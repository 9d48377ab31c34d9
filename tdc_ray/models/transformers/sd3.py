"""``SD3Transformer2DModel`` (arXiv:2403.03206): attentions of image and caption to both."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tdc_ray.models.config_types import Size, Width
from tdc_ray.models.encoding import Encoding
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
    serving,
    two_linear,
)
from tdc_ray.models.transformers.settings import TransformerSettings
from tdc_ray.models.transformers.transformer import Ends, Transformer
from tdc_ray.models.units import Unit

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    yield from embedder_layers(f"{embed}.timestep_embedder", stream)
    yield from two_linear(f"{embed}.text_embedder", Channels(sd3.pooled_projection_dim), stream)
    states = Channels(sd3.joint_attention_dim)
    yield linear("context_embedder", states, stream, tokens=CAPTION_TOKENS)
    for block in block_names(sd3):
        second, of_caption = units.get(f"{block}.attn2"), units.get(f"{block}.ff_context")
        heads, normed = units[f"{block}.attn"], sd3.qk_norm is not None
        for norm, *others in (
            ("norm1", units[f"{block}.ff"], second),
            ("norm1_context", of_caption),
        ):
            branches = [heads, *(unit for unit in others if unit is not None)]
            rows = Channels((3 if len(branches) > 1 else 2) * width)  # the last has no gate
            modulation = (serving(rows, unit.name) for unit in branches)
            yield linear(f"{block}.{norm}.linear", stream, *modulation)
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
    from tdc_ray.models.transformers.steps import joint_block

    return [
        step
        for index, block in enumerate(sd3.transformer_blocks)
        for step in joint_block(f"transformer_blocks.{index}", block)
    ]


def _remaining_block(block: Any, gone: Collection[str], is_first: bool) -> "nn.Module":  # noqa: FBT001
    from tdc_ray.models.transformers.remaining import RemainingJointBlock

    del is_first
    return RemainingJointBlock(block, gone)


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
    remaining_block=_remaining_block,
    last_shift=_last_shift,
    captions=_captions,
    encodings={
        "StableDiffusion3": Encoding(
            {STATES: (0, 1), "pooled_projections": (2, 3)}, states_of="text_encoder_3"
        )
    },
)

"""``SanaTransformer2DModel`` (SANA, arXiv:2410.10629): linear attentions, gated convolutions.

SANA 1.5 and Sprint, which normalize queries and keys across heads, are not described.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tdc_ray.config.validation import Share
from tdc_ray.models.config_types import Size, Width
from tdc_ray.models.encoding import Encoding
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.network_config import MASK, STATES
from tdc_ray.models.transformers.layers import (
    attention_layers,
    block_names,
    block_units,
    embedder_layers,
    linear,
    output_layer,
    patch_layer,
    serving,
    two_linear,
    vectors,
)
from tdc_ray.models.transformers.settings import TransformerSettings
from tdc_ray.models.transformers.transformer import (
    Ends,
    Transformer,
    remaining_single_block,
    single_blocks,
    single_last_shift,
)
from tdc_ray.models.units import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from tdc_ray.models.labels import Captions

CAPTION_TOKENS = 300
"""Tokens of a caption that macs are counted for, as diffusers' pipeline makes them."""


class SanaSettings(TransformerSettings):
    """The arguments of ``diffusers.SanaTransformer2DModel``, with its defaults."""

    in_channels: Width = 32
    out_channels: Width | None = 32
    num_attention_heads: Annotated[int, Field(ge=1, le=256)] = 70
    attention_head_dim: Width = 32
    num_layers: Annotated[int, Field(ge=1, le=256)] = 20
    num_cross_attention_heads: Annotated[int, Field(ge=1, le=256)] = 20
    cross_attention_head_dim: Width = 112
    cross_attention_dim: Width = 2240
    caption_channels: Width = 2304
    mlp_ratio: Annotated[float, Field(ge=1, le=16)] = 2.5
    dropout: Share = 0.0
    attention_bias: bool = False
    sample_size: Size = 32
    patch_size: Annotated[int, Field(ge=1, le=64)] = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: int | None = None
    guidance_embeds: Literal[False] = False
    guidance_embeds_scale: float = 0.1
    qk_norm: None = None
    timestep_scale: Annotated[float, Field(ge=1, le=1)] = 1.0


def _units(sana: SanaSettings) -> Iterator[Unit]:
    heads = {
        "attn1": (sana.num_attention_heads, sana.attention_head_dim),
        "attn2": (sana.num_cross_attention_heads, sana.cross_attention_head_dim),
    }
    return block_units(sana, heads, int(sana.mlp_ratio * sana.width))


def _layers(sana: SanaSettings, units: Mapping[str, Unit]) -> Iterator[Layer]:
    stream, context = Channels(sana.width), (Channels(sana.cross_attention_dim), CAPTION_TOKENS)
    yield patch_layer("patch_embed", sana)
    yield from embedder_layers("time_embed.emb.timestep_embedder", stream)
    yield linear("time_embed.linear", stream, Channels(6 * sana.width))
    states = Channels(sana.caption_channels)
    yield from two_linear("caption_projection", states, stream, tokens=CAPTION_TOKENS)
    yield vectors("caption_norm", stream)
    for block in block_names(sana):
        gated = serving(stream, f"{block}.attn1", f"{block}.ff")
        yield vectors(f"{block}.scale_shift_table", gated, 6)
        heads, cross = units[f"{block}.attn1"], units[f"{block}.attn2"]
        bias = sana.attention_bias
        yield from attention_layers(heads, stream, has_bias=bias, is_linear=True)
        yield from attention_layers(cross, stream, has_bias=True, context=context)
        if sana.norm_elementwise_affine:
            yield vectors(f"{block}.norm2", serving(stream, f"{block}.ff"), has_bias=True)
        yield from _gated_convolutions(units[f"{block}.ff"], stream)
    yield vectors("scale_shift_table", stream, 2)
    yield output_layer("proj_out", sana)


def _gated_convolutions(unit: Unit, stream: Channels) -> Iterator[Layer]:
    """Split a ``GLUMBConv``, whose second convolution takes every channel by itself."""
    name, tokens, inner = unit.name, unit.pixels, Channels(unit.width, unit.name)
    yield Layer(f"{name}.conv_inverted", (stream,), (inner, inner), pixels=tokens)
    yield Layer(f"{name}.conv_depth", (Channels(1),), (inner, inner), 9, tokens)
    yield Layer(f"{name}.conv_point", (inner,), (stream,), pixels=tokens, has_bias=False)


def _embed(
    sana: Any, x_t: "Tensor", timesteps: "Tensor", captions: "Captions"
) -> "tuple[Tensor, Tensor]":
    from tdc_ray.models.transformers.steps import single_embedding

    del x_t
    context = sana.caption_norm(sana.caption_projection(captions[STATES]))
    return single_embedding(sana.time_embed, timesteps, None, sana.dtype), context


SANA = Transformer(
    name="SanaTransformer2DModel",
    settings_of=SanaSettings.of,
    units=_units,
    layers=_layers,
    ends=Ends("patch_embed", "norm_out.norm", "proj_out"),
    embed=_embed,
    blocks=single_blocks,
    remaining_block=remaining_single_block,
    last_shift=single_last_shift,
    captions=lambda sana: {
        STATES: (CAPTION_TOKENS, sana.caption_channels),
        MASK: (CAPTION_TOKENS,),
    },
    encodings={"Sana": Encoding({STATES: (0, 2), MASK: (1, 3)})},
)

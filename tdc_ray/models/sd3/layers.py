"""The layers and units of any ``SD3Transformer2DModel``, derived from its config without torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tdc_ray.models.config_types import Size, Width
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.network_config import STATES, NetworkConfig
from tdc_ray.models.transformers.layers import (
    attention_layers,
    attention_unit,
    check_inner,
    embedder_layers,
    feed_forward_layers,
    feed_forward_unit,
    linear,
    num_patches,
)
from tdc_ray.models.units import SpaceKind, Unit

CAPTION_TOKENS = 333
"""Tokens of a caption that macs are counted for, as diffusers' pipeline makes them: CLIP's 77 and
T5's 256."""


class SD3Settings(BaseModel):
    """The arguments of ``diffusers.SD3Transformer2DModel``, with its defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sample_size: Size = 128
    patch_size: Annotated[int, Field(ge=1, le=64)] = 2
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

    @property
    def width(self) -> int:
        """Channels of both streams."""
        return self.num_attention_heads * self.attention_head_dim


def settings_of(config: Mapping[str, Any]) -> SD3Settings:
    """Return a network's settings, with diffusers' defaults for those left out."""
    known: Any = {key: value for key, value in config.items() if not key.startswith("_")}
    return SD3Settings(**known)


def units_of(config: NetworkConfig, kind: SpaceKind = "inner") -> tuple[Unit, ...]:
    """Return the heads of every attention and the widths of both feed-forwards of every block.

    A head of the joint attention is one of the image and of the caption together. ``pixels`` are
    the tokens that a unit's block outputs.

    Raises:
        UnsupportedModelError: The stream is to be pruned, too, or patches do not tile the images.
    """
    check_inner(kind)
    sd3 = settings_of(config)
    tokens = num_patches(sd3.sample_size, sd3.patch_size)
    heads, size, units = sd3.num_attention_heads, sd3.attention_head_dim, list[Unit]()
    for index in range(sd3.num_layers):
        name, is_last = f"transformer_blocks.{index}", index == sd3.num_layers - 1
        both = tokens if is_last else tokens + CAPTION_TOKENS
        units.append(attention_unit(f"{name}.attn", heads, size, both))
        if index in sd3.dual_attention_layers:
            units.append(attention_unit(f"{name}.attn2", heads, size, tokens))
        units.append(feed_forward_unit(f"{name}.ff", 4 * sd3.width, tokens))
        if not is_last:
            context = feed_forward_unit(f"{name}.ff_context", 4 * sd3.width, CAPTION_TOKENS)
            units.append(context)
    return tuple(units)


def caption_shapes(config: NetworkConfig) -> Mapping[str, tuple[int, ...]]:
    """Return what it reads of a caption: states of its tokens, and the caption as a whole."""
    sd3 = settings_of(config)
    states = (CAPTION_TOKENS, sd3.joint_attention_dim)
    return {STATES: states, "pooled_projections": (sd3.pooled_projection_dim,)}


def all_layers(config: NetworkConfig) -> Sequence[Layer]:
    """Return the layers that have parameters, and products, in the order of the forward pass."""
    units = {unit.name: unit for unit in units_of(config)}
    return list(_walk(settings_of(config), units))


def _walk(sd3: SD3Settings, units: Mapping[str, Unit]) -> Iterator[Layer]:
    width, stream, area = sd3.width, Channels(sd3.width), sd3.patch_size**2
    tokens = num_patches(sd3.sample_size, sd3.patch_size)
    yield Layer("pos_embed.proj", (Channels(sd3.in_channels),), (stream,), area, tokens)
    yield from embedder_layers("time_text_embed.timestep_embedder", width)
    pooled = Channels(sd3.pooled_projection_dim)
    yield linear("time_text_embed.text_embedder.linear_1", pooled, stream)
    yield linear("time_text_embed.text_embedder.linear_2", stream, stream)
    states = Channels(sd3.joint_attention_dim)
    yield linear("context_embedder", states, stream, tokens=CAPTION_TOKENS)
    for block in (f"transformer_blocks.{index}" for index in range(sd3.num_layers)):
        second, of_context = units.get(f"{block}.attn2"), units.get(f"{block}.ff_context")
        modulation, of_caption = 9 if second else 6, 6 if of_context else 2
        yield linear(f"{block}.norm1.linear", stream, Channels(modulation * width))
        yield linear(f"{block}.norm1_context.linear", stream, Channels(of_caption * width))
        is_last = of_context is None
        yield from _joint_attention(sd3, units[f"{block}.attn"], tokens, is_last=is_last)
        if second is not None:
            yield from _head_norms(sd3, second, "norm_q", "norm_k")
            yield from attention_layers(second, stream, has_bias=True)
        for unit in (units[f"{block}.ff"], of_context):
            if unit is not None:
                yield from feed_forward_layers(unit, stream, "gelu-approximate")
    yield linear("norm_out.linear", stream, Channels(2 * width))
    outputs = Channels(area * (sd3.out_channels or sd3.in_channels))
    yield linear("proj_out", stream, outputs, tokens=tokens)


def _joint_attention(
    sd3: SD3Settings, unit: Unit, tokens: int, *, is_last: bool
) -> Iterator[Layer]:
    """Yield the layers of an attention of both streams to both; the last outputs the image's."""
    name, stream = unit.name, Channels(sd3.width)
    inner, both = Channels(sd3.width, name), tokens + CAPTION_TOKENS
    for one in ("to_q", "to_k", "to_v"):
        yield linear(f"{name}.{one}", stream, inner, tokens=tokens)
    yield from _head_norms(sd3, unit, "norm_q", "norm_k", "norm_added_q", "norm_added_k")
    for one in ("add_q_proj", "add_k_proj", "add_v_proj"):
        yield linear(f"{name}.{one}", stream, inner, tokens=CAPTION_TOKENS)
    yield Layer(f"{name}.products", (Channels(2 * both),), (inner,), 1, both, has_weight=False)
    if not is_last:
        yield linear(f"{name}.to_add_out", inner, stream, tokens=CAPTION_TOKENS)
    yield linear(f"{name}.to_out.0", inner, stream, tokens=tokens)


def _head_norms(sd3: SD3Settings, unit: Unit, *names: str) -> Iterator[Layer]:
    """Yield the norms of queries and keys, which all heads share, if it has them."""
    if sd3.qk_norm is not None:
        size = Channels(unit.channels)
        for name in names:
            yield Layer(f"{unit.name}.{name}", (Channels(1),), (size,), has_bias=False)

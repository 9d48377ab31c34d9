"""The layers and units of any ``PixArtTransformer2DModel``, from its config without torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from tdc_ray.models.config_types import Width
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.network_config import STATES, NetworkConfig
from tdc_ray.models.transformers.layers import (
    attention_layers,
    block_units,
    embedder_layers,
    feed_forward_layers,
    linear,
)
from tdc_ray.models.transformers.settings import TransformerSettings
from tdc_ray.models.units import SpaceKind, Unit

CAPTION_TOKENS = 120
"""Tokens of a caption that macs are counted for, as PixArt-alpha has them."""


class PixArtSettings(TransformerSettings):
    """The arguments of ``diffusers.PixArtTransformer2DModel``, with its defaults."""

    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    out_channels: Width | None = 8
    sample_size: Width = 128
    norm_eps: float = 1e-6
    cross_attention_dim: Width = 1152
    interpolation_scale: int | None = None
    use_additional_conditions: bool | None = None
    caption_channels: Width | None = None
    attention_type: Literal["default"] | None = "default"

    @property
    def reads_sizes(self) -> bool:
        """Whether it is told the images' resolution and aspect ratio."""
        extra = self.use_additional_conditions
        return self.sample_size == 128 if extra is None else extra


def settings_of(config: NetworkConfig) -> PixArtSettings:
    """Return a network's settings, with diffusers' defaults for those left out."""
    known: Any = {key: value for key, value in config.items() if not key.startswith("_")}
    return PixArtSettings(**known)


def units_of(config: NetworkConfig, kind: SpaceKind = "inner") -> tuple[Unit, ...]:
    """Return the heads of both attentions and the feed-forward's width of every block."""
    return block_units(settings_of(config), kind, "attn1", "attn2")


def caption_shapes(config: NetworkConfig) -> Mapping[str, tuple[int, ...]]:
    """Return what it reads of a caption: states and which of them count; and sizes, if it does."""
    pixart = settings_of(config)
    width = pixart.caption_channels or pixart.cross_attention_dim
    states = {STATES: (CAPTION_TOKENS, width), "encoder_attention_mask": (CAPTION_TOKENS,)}
    sizes = {"resolution": (2,), "aspect_ratio": (1,)} if pixart.reads_sizes else {}
    return {**states, **sizes}


def all_layers(config: NetworkConfig) -> Sequence[Layer]:
    """Return the layers that have parameters, and products, in the order of the forward pass."""
    return list(_walk(settings_of(config), units_of(config)))


def _walk(pixart: PixArtSettings, units: Sequence[Unit]) -> Iterator[Layer]:
    width, tokens = pixart.num_attention_heads * pixart.attention_head_dim, units[0].pixels
    stream, area = Channels(width), pixart.patch_size**2
    yield Layer("pos_embed.proj", (Channels(pixart.in_channels),), (stream,), area, tokens)
    yield from embedder_layers("adaln_single.emb.timestep_embedder", width)
    if pixart.reads_sizes:
        for name, times in (("resolution", 2), ("aspect_ratio", 1)):
            yield from embedder_layers(
                f"adaln_single.emb.{name}_embedder", width // 3, times=times
            )
    yield linear("adaln_single.linear", stream, Channels(6 * width))
    if pixart.caption_channels is not None:
        inputs = Channels(pixart.caption_channels)
        yield linear("caption_projection.linear_1", inputs, stream, tokens=CAPTION_TOKENS)
        yield linear("caption_projection.linear_2", stream, stream, tokens=CAPTION_TOKENS)
    for own, cross, feed_forward in zip(units[::3], units[1::3], units[2::3], strict=True):
        block = own.name.removesuffix(".attn1")
        yield Layer(f"{block}.scale_shift_table", (Channels(6),), (stream,), has_bias=False)
        norms = ("norm1", "norm2") if pixart.norm_elementwise_affine else ()
        yield from (Layer(f"{block}.{name}", (Channels(1),), (stream,)) for name in norms)
        bias, context = pixart.attention_bias, Channels(pixart.cross_attention_dim)
        yield from attention_layers(own, stream, has_bias=bias)
        yield from attention_layers(
            cross, stream, has_bias=bias, context=(context, CAPTION_TOKENS)
        )
        yield from feed_forward_layers(feed_forward, stream, pixart.activation_fn)
    yield Layer("scale_shift_table", (Channels(2),), (stream,), has_bias=False)
    outputs = Channels(area * (pixart.out_channels or pixart.in_channels))
    yield linear("proj_out", stream, outputs, tokens=tokens)

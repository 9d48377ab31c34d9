"""The layers and units of a ``UNet2DConditionModel``, derived from its config without torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.network_config import STATES, CaptionShapes, NetworkConfig, image_size
from tdc_ray.models.transformers.layers import (
    attention_layers,
    attention_unit,
    feed_forward_layers,
    feed_forward_unit,
    linear,
)
from tdc_ray.models.unet2d.layers import layers
from tdc_ray.models.unet2d.shapes import ResidualBlock, conv, norm
from tdc_ray.models.unet2d.units import inner_unit
from tdc_ray.models.units import SpaceKind, Unit

CAPTION_TOKENS = 77
"""Tokens of a caption that macs are counted for: CLIP's."""

NUM_TIME_IDS = 6
"""What XL's takes of an image: height and width before it was cut, where, and those after."""

_KNOWN: Mapping[str, tuple[object, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "time_cond_proj_dim": (None,),
    "timestep_post_act": (None,),
    "time_embedding_act_fn": (None,),
    "resnet_skip_time_act": (False,),
    "cross_attention_norm": (None,),
    "reverse_transformer_layers_per_block": (None,),
}
"""Settings that change layers or what flows between them, and their values that are known; the
first is diffusers' default."""

_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}


def units_of(config: NetworkConfig, kind: SpaceKind = "inner") -> tuple[Unit, ...]:
    """Return the inner widths of residual blocks, heads and feed-forwards, in forward order.

    Raises:
        UnsupportedModelError: It has a block of an unknown kind, or streams are to be pruned.
    """
    if kind == "full":
        raise UnsupportedModelError(
            "the stream of a UNet2DConditionModel cannot be pruned: set prune.space to inner."
        )
    return tuple(part for part in _Walker(config).walk() if isinstance(part, Unit))


def caption_shapes(config: NetworkConfig) -> CaptionShapes:
    """Return what it reads of a caption; XL's reads the caption as a whole, and sizes, too."""
    full: dict[str, Any] = {**_DEFAULTS, **config}
    states = {STATES: (CAPTION_TOKENS, full["cross_attention_dim"])}
    if full["addition_embed_type"] is None:
        return states
    embedded = full["projection_class_embeddings_input_dim"]
    pooled = embedded - NUM_TIME_IDS * full["addition_time_embed_dim"]
    return {**states, "text_embeds": (pooled,), "time_ids": (NUM_TIME_IDS,)}


def all_layers(config: NetworkConfig) -> Sequence[Layer]:
    """Return the layers that have parameters, and products, in the order of the forward pass."""
    return [part for part in _Walker(config).walk() if isinstance(part, Layer)]


class _Walker:
    """Walks through a config as the network does: the resolution, the stream, its skips."""

    def __init__(self, config: NetworkConfig) -> None:
        self.config: dict[str, Any] = {**_DEFAULTS, **config}
        for setting, known in _KNOWN.items():
            value = self.config.get(setting, known[0])
            values = value if isinstance(value, list | tuple) else (value,)
            if unknown := [one for one in values if one not in known]:
                raise UnsupportedModelError(
                    f"{setting} {unknown[0]} is not supported; known are {known}."
                )
        self.widths: Sequence[int] = self.config["block_out_channels"]
        levels = len(self.widths)
        heads = self.config["num_attention_heads"] or self.config["attention_head_dim"]
        depth = self.config["transformer_layers_per_block"]
        self.heads = [heads] * levels if isinstance(heads, int) else list(heads)
        self.depth = [depth] * levels if isinstance(depth, int) else list(depth)
        self.height, self.width = image_size(config)
        self.stream = Channels(self.widths[0])
        self.skips = [self.stream]

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def walk(self) -> Iterator[Layer | Unit]:
        config, time = self.config, Channels(4 * self.widths[0])
        yield conv("conv_in", (Channels(config["in_channels"]),), self.stream, 3, self.pixels)
        yield linear("time_embedding.linear_1", self.stream, time)
        yield linear("time_embedding.linear_2", time, time)
        if config["addition_embed_type"] is not None:
            embedded = Channels(config["projection_class_embeddings_input_dim"])
            yield linear("add_embedding.linear_1", embedded, time)
            yield linear("add_embedding.linear_2", time, time)
        last = len(self.widths) - 1
        for level, kind in enumerate(config["down_block_types"]):
            name = f"down_blocks.{level}"
            for index in range(config["layers_per_block"]):
                yield from self._residual(f"{name}.resnets.{index}", level)
                if kind == "CrossAttnDownBlock2D":
                    yield from self._attention(f"{name}.attentions.{index}", level)
                self.skips.append(self.stream)
            if level < last:
                self.height, self.width = self.height // 2, self.width // 2
                yield self._resample(f"{name}.downsamplers.0")
                self.skips.append(self.stream)
        yield from self._residual("mid_block.resnets.0", last)
        yield from self._attention("mid_block.attentions.0", last)
        yield from self._residual("mid_block.resnets.1", last)
        for number, kind in enumerate(config["up_block_types"]):
            level, name = last - number, f"up_blocks.{number}"
            for index in range(config["layers_per_block"] + 1):
                yield from self._residual(f"{name}.resnets.{index}", level, self.skips.pop())
                if kind == "CrossAttnUpBlock2D":
                    yield from self._attention(f"{name}.attentions.{index}", level)
            if level > 0:
                self.height, self.width = 2 * self.height, 2 * self.width
                yield self._resample(f"{name}.upsamplers.0")
        yield norm("conv_norm_out", self.stream)
        yield conv("conv_out", (self.stream,), Channels(config["out_channels"]), 3, self.pixels)

    def _resample(self, name: str) -> Layer:
        return conv(f"{name}.conv", (self.stream,), self.stream, 3, self.pixels)

    def _residual(
        self, name: str, level: int, skip: Channels | None = None
    ) -> Iterator[Layer | Unit]:
        inputs = (self.stream,) if skip is None else (self.stream, skip)
        self.stream = Channels(self.widths[level])
        groups, time = self.config["norm_num_groups"], 4 * self.widths[0]
        block = ResidualBlock(
            name, inputs, self.stream, time, groups, scale_shift=False, pixels=self.pixels
        )
        yield inner_unit(block)
        yield from layers(block)

    def _attention(self, name: str, level: int) -> Iterator[Layer | Unit]:
        stream, tokens, heads = self.stream, self.pixels, self.heads[level]
        yield norm(f"{name}.norm", stream)
        yield linear(f"{name}.proj_in", stream, stream, tokens=tokens)
        context = (Channels(self.config["cross_attention_dim"]), CAPTION_TOKENS)
        for index in range(self.depth[level]):
            block = f"{name}.transformer_blocks.{index}"
            for number, source in ((1, None), (2, context)):
                unit = attention_unit(
                    f"{block}.attn{number}", heads, stream.count // heads, tokens
                )
                yield norm(f"{block}.norm{number}", stream)
                yield unit
                yield from attention_layers(unit, stream, has_bias=False, context=source)
            unit = feed_forward_unit(f"{block}.ff", 4 * stream.count, tokens)
            yield norm(f"{block}.norm3", stream)
            yield unit
            yield from feed_forward_layers(unit, stream, "geglu")
        yield linear(f"{name}.proj_out", stream, stream, tokens=tokens)

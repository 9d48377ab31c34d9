"""The layers of any ``UNet2DModel``, derived from its config without torch."""

from collections.abc import Iterator, Mapping
from typing import Literal

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.layer import STREAM, Channels, Layer, total
from tdc_ray.models.network_config import NetworkConfig, image_size, num_heads_of
from tdc_ray.models.unet2d.architectures import (
    ATTN_DOWN,
    ATTN_UP,
    DOWN,
    RESNET_DOWN,
    RESNET_UP,
    UP,
)
from tdc_ray.models.unet2d.shapes import AttentionBlock, Block, ResidualBlock, conv, linear, norm

_DEFAULTS: NetworkConfig = {
    "layers_per_block": 2,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "mid_block_type": "UNetMidBlock2D",
    "add_attention": True,
    "time_embedding_type": "positional",
    "class_embed_type": None,
}
_BLOCK_KINDS = (DOWN, ATTN_DOWN, UP, ATTN_UP, RESNET_DOWN, RESNET_UP)

_KNOWN_VALUES: Mapping[str, tuple[object, ...]] = {
    "mid_block_type": (None, "UNetMidBlock2D"),
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}


def blocks(config: NetworkConfig) -> list[Block]:
    """Return the blocks of a ``UNet2DModel`` of this config, in the order of its forward pass.

    Raises:
        UnsupportedModelError: It has a block, or an embedding, of an unknown kind.
    """
    return list(_UNetWalker(config).walk())


def layers(block: Block) -> list[Layer]:
    """Split a block into the layers that have parameters."""
    if isinstance(block, Layer):
        return [block]
    name, inner, stream, pixels = block.name, block.inner, block.stream, block.pixels
    if isinstance(block, AttentionBlock):
        return [
            *([norm(f"{name}.group_norm", stream)] if block.num_groups else []),
            *(linear(f"{name}.to_{p}", stream, inner, pixels=pixels) for p in "qkv"),
            linear(f"{name}.to_out.0", inner, stream, pixels=pixels),
        ]
    embedded = (inner, inner) if block.scale_shift else (inner,)
    residual = [
        norm(f"{name}.norm1", *block.inputs),
        conv(f"{name}.conv1", block.inputs, inner, 3, pixels),
        linear(f"{name}.time_emb_proj", Channels(block.time_channels), *embedded),
        norm(f"{name}.norm2", inner),
        conv(f"{name}.conv2", (inner,), stream, 3, pixels),
    ]
    if block.in_channels != stream.count:
        residual.append(conv(f"{name}.conv_shortcut", block.inputs, stream, 1, pixels))
    return residual


def all_layers(config: NetworkConfig) -> list[Layer]:
    """Return the layers of a UNet that have parameters, in the order of its forward pass."""
    return [layer for block in blocks(config) for layer in layers(block)]


class _UNetWalker:
    """Walks through a config as ``UNet2DModel`` does: the resolution, the stream, its skips."""

    def __init__(self, config: NetworkConfig) -> None:
        self.config: NetworkConfig = {**_DEFAULTS, **config}
        self.channels: tuple[int, ...] = tuple(self.config["block_out_channels"])
        self.time_channels: int = self.config.get("time_embedding_dim") or self.channels[0] * 4
        self.height, self.width = image_size(config)
        for kind in (*self.config["down_block_types"], *self.config["up_block_types"]):
            if kind not in _BLOCK_KINDS:
                raise UnsupportedModelError(
                    f"block {kind} is not supported; known are {', '.join(_BLOCK_KINDS)}."
                )
        for setting, value in self.config.items():
            if value not in (known := _KNOWN_VALUES.get(setting, (value,))):
                raise UnsupportedModelError(
                    f"{setting} {value} is not supported; known are {known}."
                )
        self._check_halving()
        self.stream = Channels(self.channels[0], f"{STREAM}conv_in")
        self.skips = [self.stream]

    @property
    def _pixels(self) -> int:
        """Pixels at the current level."""
        return self.height * self.width

    def _check_halving(self) -> None:
        """Refuse sides that a level cannot halve: upsampled, they would not meet their skips."""
        times = len(self.channels) - 1
        factor = 2**times
        for name, side in (("height", self.height), ("width", self.width)):
            if side % factor:
                below = side // factor * factor
                sides = " or ".join(str(one) for one in (below, below + factor) if one)
                name = "sample_size" if self.height == self.width else f"sample_size's {name}"
                raise UnsupportedModelError(
                    f"a {name} of {side} cannot be halved {times} times, as the model's levels "
                    f"do: {sides} can. Set that in its config.json, if it has one, and as the "
                    "size of the images, or use another model."
                )

    def walk(self) -> Iterator[Block]:
        config, pixels = self.config, self._pixels
        time = Channels(self.time_channels)
        yield conv("conv_in", (Channels(config["in_channels"]),), self.stream, 3, pixels)
        embedded = config.get("timestep_channels") or self.channels[0]
        yield linear("time_embedding.linear_1", Channels(embedded), time)
        yield linear("time_embedding.linear_2", time, time)
        if (num_classes := config["num_class_embeds"]) is not None:
            yield Layer("class_embedding", (Channels(num_classes),), (time,), has_bias=False)
        yield from self._down()
        yield from self._mid()
        yield from self._up()
        yield norm("conv_norm_out", self.stream)
        yield conv("conv_out", (self.stream,), Channels(config["out_channels"]), 3, pixels)

    def _down(self) -> Iterator[Block]:
        for index, kind in enumerate(self.config["down_block_types"]):
            width, name = self.channels[index], f"down_blocks.{index}"
            for layer in range(self.config["layers_per_block"]):
                yield self._residual(f"{name}.resnets.{layer}", (self.stream,), width)
                if kind == ATTN_DOWN:
                    groups = self.config["norm_num_groups"]
                    yield self._attention(f"{name}.attentions.{layer}", groups)
                self.skips.append(self.stream)
            if index == len(self.channels) - 1:
                continue
            by_resnet = self._samples_by_resnet(kind, ATTN_DOWN, "downsample_type")
            self.height, self.width = self.height // 2, self.width // 2
            yield self._resample(f"{name}.downsamplers.0", by_resnet=by_resnet)
            self.skips.append(self.stream)

    def _mid(self) -> Iterator[Block]:
        if self.config["mid_block_type"] is None:
            return
        width = self.stream.count
        yield self._residual("mid_block.resnets.0", (self.stream,), width)
        if self.config["add_attention"]:
            groups = self.config["attn_norm_num_groups"]
            if groups is None and self.config["resnet_time_scale_shift"] == "default":
                groups = self.config["norm_num_groups"]
            yield self._attention("mid_block.attentions.0", groups)
        yield self._residual("mid_block.resnets.1", (self.stream,), width)

    def _up(self) -> Iterator[Block]:
        for index, kind in enumerate(self.config["up_block_types"]):
            width, name = self.channels[-1 - index], f"up_blocks.{index}"
            for layer in range(self.config["layers_per_block"] + 1):
                inputs = (self.stream, self.skips.pop())
                yield self._residual(f"{name}.resnets.{layer}", inputs, width)
                if kind == ATTN_UP:
                    groups = self.config["norm_num_groups"]
                    yield self._attention(f"{name}.attentions.{layer}", groups)
            if index < len(self.channels) - 1:
                by_resnet = self._samples_by_resnet(kind, ATTN_UP, "upsample_type")
                self.height, self.width = 2 * self.height, 2 * self.width
                yield self._resample(f"{name}.upsamplers.0", by_resnet=by_resnet)

    def _samples_by_resnet(
        self,
        kind: str,
        attention_kind: str,
        setting: Literal["downsample_type", "upsample_type"],
    ) -> bool:
        return kind in (RESNET_DOWN, RESNET_UP) or (
            kind == attention_kind and self.config[setting] == "resnet"
        )

    def _resample(self, name: str, *, by_resnet: bool) -> Block:
        before = self.stream
        if by_resnet:
            return self._residual(name, (before,), before.count)
        self.stream = Channels(before.count, f"{STREAM}{name}")
        return conv(f"{name}.conv", (before,), self.stream, 3, self._pixels)

    def _residual(self, name: str, inputs: tuple[Channels, ...], width: int) -> ResidualBlock:
        if total(inputs) != width:  # its shortcut is a convolution: nothing is added to the stream
            self.stream = Channels(width, f"{STREAM}{name}")
        return ResidualBlock(
            name,
            inputs,
            self.stream,
            self.time_channels,
            self.config["norm_num_groups"],
            self.config["resnet_time_scale_shift"] == "scale_shift",
            self._pixels,
        )

    def _attention(self, name: str, num_groups: int | None) -> AttentionBlock:
        channels = self.stream.count
        head_dim = self.config["attention_head_dim"] or channels
        num_heads = num_heads_of(self.config, name, channels)
        if channels % head_dim or channels % num_heads:
            raise UnsupportedModelError(
                f"{name} has {channels} channels, which its heads do not divide evenly."
            )
        return AttentionBlock(name, self.stream, num_heads, num_groups, self._pixels)

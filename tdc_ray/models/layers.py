"""The layers of any ``UNet2DModel``, told from its config without torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.architectures import ATTN_DOWN, ATTN_UP, DOWN, UP, UNetConfig


@dataclass(frozen=True, slots=True)
class Layer:
    """Parameters and cost of one module of a UNet."""

    name: str
    """Its dotted name in the ``UNet2DModel``."""

    num_params: int
    macs: int
    """Multiply-accumulates for one image; 0 for norms and embeddings, which are not counted."""


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """A ``ResnetBlock2D``: its inner width lies between ``conv1`` and ``conv2``."""

    name: str
    in_channels: int
    out_channels: int
    time_channels: int
    num_groups: int
    scale_shift: bool
    pixels: int
    """Height times width of its output."""


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """An ``Attention``: its inner width is ``num_heads`` heads of ``channels / num_heads``."""

    name: str
    channels: int
    num_heads: int
    has_norm: bool
    pixels: int


Part = Layer | ResidualBlock | AttentionBlock

_DEFAULTS: UNetConfig = {
    "layers_per_block": 2,
    "downsample_padding": 1,
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
_BLOCK_KINDS = (
    DOWN,
    ATTN_DOWN,
    UP,
    ATTN_UP,
    "ResnetDownsampleBlock2D",
    "ResnetUpsampleBlock2D",
)


def parts(config: UNetConfig) -> list[Part]:
    """List what a ``UNet2DModel`` of this config consists of, in the order of its forward pass.

    Raises:
        UnsupportedModelError: It has a block, or an embedding, of a kind that is not known here.
    """
    return list(_Walk(config).walk())


def layers(part: Part) -> list[Layer]:
    """Split a part into the layers that have parameters."""
    if isinstance(part, Layer):
        return [part]
    if isinstance(part, AttentionBlock):
        width, name = part.channels, part.name
        norm = [Layer(f"{name}.group_norm", 2 * width, 0)] if part.has_norm else []
        projections = ("to_q", "to_k", "to_v", "to_out.0")
        return norm + [_linear(f"{name}.{p}", width, width, part.pixels) for p in projections]
    inner, name = part.out_channels, part.name
    embedded = 2 * inner if part.scale_shift else inner
    found = [
        Layer(f"{name}.norm1", 2 * part.in_channels, 0),
        _conv(f"{name}.conv1", part.in_channels, inner, 3, part.pixels),
        _linear(f"{name}.time_emb_proj", part.time_channels, embedded, 1),
        Layer(f"{name}.norm2", 2 * inner, 0),
        _conv(f"{name}.conv2", inner, part.out_channels, 3, part.pixels),
    ]
    if part.in_channels != part.out_channels:
        found.append(
            _conv(f"{name}.conv_shortcut", part.in_channels, part.out_channels, 1, part.pixels)
        )
    return found


def count(config: UNetConfig) -> tuple[int, int]:
    """Count parameters, and macs of one forward pass for one image.

    Macs are those of convolutions and linear layers, without the two products inside attention, as
    the paper counts them (it calls them FLOPs).

    Returns:
        ``(num_params, macs)``.
    """
    found = [layer for part in parts(config) for layer in layers(part)]
    return sum(layer.num_params for layer in found), sum(layer.macs for layer in found)


def _conv(name: str, in_channels: int, out_channels: int, kernel: int, pixels: int) -> Layer:
    weights = in_channels * out_channels * kernel * kernel
    return Layer(name, weights + out_channels, weights * pixels)


def _linear(name: str, in_features: int, out_features: int, pixels: int) -> Layer:
    weights = in_features * out_features
    return Layer(name, weights + out_features, weights * pixels)


class _Walk:
    """Walks through a config as ``UNet2DModel.__init__`` does, keeping track of the resolution."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = {**_DEFAULTS, **config}
        self.channels: tuple[int, ...] = tuple(self.config["block_out_channels"])
        self.time_channels: int = self.config.get("time_embedding_dim") or self.channels[0] * 4
        size = self.config["sample_size"]
        self.size: int = size if isinstance(size, int) else size[0]
        if not isinstance(size, int) and len(set(size)) > 1:
            raise UnsupportedModelError(f"only square samples are supported, got {size}.")
        for kind in (*self.config["down_block_types"], *self.config["up_block_types"]):
            if kind not in _BLOCK_KINDS:
                raise UnsupportedModelError(
                    f"block {kind} is not supported; known are {', '.join(_BLOCK_KINDS)}."
                )
        for setting, known in (
            ("mid_block_type", (None, "UNetMidBlock2D")),
            ("time_embedding_type", ("positional",)),
            ("class_embed_type", (None,)),
            ("resnet_time_scale_shift", ("default", "scale_shift")),
        ):
            if self.config[setting] not in known:
                raise UnsupportedModelError(
                    f"{setting} {self.config[setting]} is not supported; known are {known}."
                )

    def walk(self) -> Iterator[Part]:
        config, channels = self.config, self.channels
        pixels = self.size**2
        yield _conv("conv_in", config["in_channels"], channels[0], 3, pixels)
        yield _linear("time_embedding.linear_1", channels[0], self.time_channels, 1)
        yield _linear("time_embedding.linear_2", self.time_channels, self.time_channels, 1)
        if config["num_class_embeds"] is not None:
            num_params = config["num_class_embeds"] * self.time_channels
            yield Layer("class_embedding", num_params, 0)
        yield from self._down()
        yield from self._mid()
        yield from self._up()
        yield Layer("conv_norm_out", 2 * channels[0], 0)
        yield _conv("conv_out", channels[0], config["out_channels"], 3, pixels)

    def _down(self) -> Iterator[Part]:
        previous = self.channels[0]
        for index, kind in enumerate(self.config["down_block_types"]):
            width, name = self.channels[index], f"down_blocks.{index}"
            for layer in range(self.config["layers_per_block"]):
                yield self._residual(f"{name}.resnets.{layer}", previous, width)
                previous = width
                if kind == ATTN_DOWN:
                    yield self._attention(f"{name}.attentions.{layer}", width, has_norm=True)
            if index == len(self.channels) - 1:
                continue
            padding = self.config["downsample_padding"]
            by_resnet = self._samples_by_resnet(kind, ATTN_DOWN, "downsample_type")
            halves = by_resnet or padding == 0
            self.size = self.size // 2 if halves else (self.size - 1) // 2 + 1
            yield self._resample(f"{name}.downsamplers.0", width, by_resnet=by_resnet)

    def _mid(self) -> Iterator[Part]:
        if self.config["mid_block_type"] is None:
            return
        width = self.channels[-1]
        yield self._residual("mid_block.resnets.0", width, width)
        if self.config["add_attention"]:
            default = self.config["resnet_time_scale_shift"] == "default"
            has_norm = self.config["attn_norm_num_groups"] is not None or default
            yield self._attention("mid_block.attentions.0", width, has_norm=has_norm)
        yield self._residual("mid_block.resnets.1", width, width)

    def _up(self) -> Iterator[Part]:
        widths = self.channels[::-1]
        previous = widths[0]
        for index, kind in enumerate(self.config["up_block_types"]):
            width, name = widths[index], f"up_blocks.{index}"
            deepest = widths[min(index + 1, len(widths) - 1)]
            num_layers = self.config["layers_per_block"] + 1
            for layer in range(num_layers):
                skip = deepest if layer == num_layers - 1 else width
                yield self._residual(f"{name}.resnets.{layer}", previous + skip, width)
                previous = width
                if kind == ATTN_UP:
                    yield self._attention(f"{name}.attentions.{layer}", width, has_norm=True)
            if index < len(widths) - 1:
                by_resnet = self._samples_by_resnet(kind, ATTN_UP, "upsample_type")
                self.size *= 2
                yield self._resample(f"{name}.upsamplers.0", width, by_resnet=by_resnet)

    def _samples_by_resnet(
        self,
        kind: str,
        attention_kind: str,
        setting: Literal["downsample_type", "upsample_type"],
    ) -> bool:
        resnet_kinds = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        return kind in resnet_kinds or (
            kind == attention_kind and self.config[setting] == "resnet"
        )

    def _resample(self, name: str, width: int, *, by_resnet: bool) -> Part:
        if by_resnet:
            return self._residual(name, width, width)
        return _conv(f"{name}.conv", width, width, 3, self.size**2)

    def _residual(self, name: str, in_channels: int, out_channels: int) -> ResidualBlock:
        return ResidualBlock(
            name,
            in_channels,
            out_channels,
            self.time_channels,
            self.config["norm_num_groups"],
            self.config["resnet_time_scale_shift"] == "scale_shift",
            self.size**2,
        )

    def _attention(self, name: str, channels: int, *, has_norm: bool) -> AttentionBlock:
        head_dim = self.config["attention_head_dim"] or channels
        if self.config.get("num_heads"):
            head_dim = channels // self.config["num_heads"]
        if head_dim == 0 or channels % head_dim:
            raise UnsupportedModelError(
                f"{name} has {channels} channels, which its heads do not divide evenly."
            )
        num_heads = channels // head_dim
        return AttentionBlock(name, channels, num_heads, has_norm, self.size**2)

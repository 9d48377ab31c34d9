"""``PixArtTransformer2DModel`` (arXiv:2310.00426): conditioned on captions by cross-attention."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from tdc_ray.models.config_types import Width
from tdc_ray.models.encoding import Encoding
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.network_config import MASK, STATES, CaptionShapes
from tdc_ray.models.transformers.layers import (
    attention_layers,
    block_names,
    block_units,
    embedder_layers,
    feed_forward_layers,
    linear,
    output_layer,
    patch_layer,
    serving,
    two_linear,
    vectors,
)
from tdc_ray.models.transformers.settings import BasicTransformerSettings
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

CAPTION_TOKENS = 120
"""Tokens of a caption that macs are counted for, as PixArt-alpha has them."""

SIZES: CaptionShapes = {"resolution": (2,), "aspect_ratio": (1,)}
"""What some take of an image: height and width, and the one over the other."""


class PixArtSettings(BasicTransformerSettings):
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
        """Whether it takes the images' resolution and aspect ratio."""
        extra = self.use_additional_conditions
        return self.sample_size == 128 if extra is None else extra


def _units(pixart: PixArtSettings) -> Iterator[Unit]:
    heads = (pixart.num_attention_heads, pixart.attention_head_dim)
    return block_units(pixart, {"attn1": heads, "attn2": heads}, 4 * pixart.width)


def _layers(pixart: PixArtSettings, units: Mapping[str, Unit]) -> Iterator[Layer]:
    width, stream, has_bias = pixart.width, Channels(pixart.width), pixart.attention_bias
    yield patch_layer("pos_embed", pixart)
    yield from embedder_layers("adaln_single.emb.timestep_embedder", stream)
    if pixart.reads_sizes:
        for name, times in (("resolution", 2), ("aspect_ratio", 1)):
            yield from embedder_layers(
                f"adaln_single.emb.{name}_embedder", Channels(width // 3), times=times
            )
    yield linear("adaln_single.linear", stream, Channels(6 * width))
    if pixart.caption_channels is not None:
        states = Channels(pixart.caption_channels)
        yield from two_linear("caption_projection", states, stream, tokens=CAPTION_TOKENS)
    context = (Channels(pixart.cross_attention_dim), CAPTION_TOKENS)
    for block in block_names(pixart):
        gated = {"norm1": f"{block}.attn1", "norm2": f"{block}.ff"}
        yield vectors(f"{block}.scale_shift_table", serving(stream, *gated.values()), 6)
        for norm, branch in gated.items() if pixart.norm_elementwise_affine else ():
            yield vectors(f"{block}.{norm}", serving(stream, branch), has_bias=True)
        yield from attention_layers(units[f"{block}.attn1"], stream, has_bias=has_bias)
        cross = units[f"{block}.attn2"]
        yield from attention_layers(cross, stream, has_bias=has_bias, context=context)
        yield from feed_forward_layers(units[f"{block}.ff"], stream, pixart.activation_fn)
    yield vectors("scale_shift_table", stream, 2)
    yield output_layer("proj_out", pixart)


def _captions(pixart: PixArtSettings) -> CaptionShapes:
    width = pixart.caption_channels or pixart.cross_attention_dim
    sizes = SIZES if pixart.reads_sizes else {}
    return {STATES: (CAPTION_TOKENS, width), MASK: (CAPTION_TOKENS,), **sizes}


def _embed(
    pixart: Any, x_t: "Tensor", timesteps: "Tensor", captions: "Captions"
) -> "tuple[Tensor, Tensor]":
    from tdc_ray.models.transformers.steps import single_embedding

    del x_t
    size, context = {name: captions.get(name) for name in SIZES}, captions[STATES]
    if pixart.caption_projection is not None:
        context = pixart.caption_projection(context)
    return single_embedding(pixart.adaln_single, timesteps, size, pixart.dtype), context


PIXART = Transformer(
    name="PixArtTransformer2DModel",
    settings_of=PixArtSettings.of,
    units=_units,
    layers=_layers,
    ends=Ends("pos_embed", "norm_out", "proj_out"),
    embed=_embed,
    blocks=single_blocks,
    remaining_block=remaining_single_block,
    last_shift=single_last_shift,
    captions=_captions,
    encodings={"PixArt": Encoding({STATES: (0, 2), MASK: (1, 3)}, tuple(SIZES))},
)

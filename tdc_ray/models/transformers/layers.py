"""Attentions and feed-forwards of transformers as layers, and what can be pruned of them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.transformers.settings import TransformerSettings
from tdc_ray.models.units import Unit

FREQUENCIES = 256
"""Channels of a timestep before it is embedded."""

TWO_HALVES = ("geglu", "swiglu")
"""Activations that multiply one half of the first layer's outputs by the other."""


def linear(
    name: str, inputs: Channels, *outputs: Channels, tokens: int = 1, has_bias: bool = True
) -> Layer:
    """Describe a ``Linear`` that is applied to every token, or once."""
    return Layer(name, (inputs,), outputs, pixels=tokens, has_bias=has_bias)


def serving(channels: Channels, *branches: str) -> Channels:
    """Return outputs that go with the last of the units of some branches."""
    return replace(channels, branches=branches)


def vectors(name: str, channels: Channels, count: int = 1, *, has_bias: bool = False) -> Layer:
    """Describe a table of vectors, or a norm's weights, whose macs do not count."""
    return Layer(name, (Channels(count),), (channels,), has_bias=has_bias)


def patch_layer(name: str, settings: TransformerSettings) -> Layer:
    """Describe the convolution of a ``PatchEmbed``."""
    inputs, stream = Channels(settings.in_channels), Channels(settings.width)
    return Layer(f"{name}.proj", (inputs,), (stream,), settings.patch_size**2, settings.tokens)


def output_layer(name: str, settings: TransformerSettings) -> Layer:
    """Describe the linear layer to the pixels of patches."""
    channels = settings.out_channels or settings.in_channels
    outputs = Channels(settings.patch_size**2 * channels)
    return linear(name, Channels(settings.width), outputs, tokens=settings.tokens)


def two_linear(
    name: str, inputs: Channels, outputs: Channels, *, tokens: int = 1
) -> Iterator[Layer]:
    """Split a ``TimestepEmbedding`` or a text projection; it may serve an image several times."""
    yield linear(f"{name}.linear_1", inputs, outputs, tokens=tokens)
    yield linear(f"{name}.linear_2", outputs, outputs, tokens=tokens)


def embedder_layers(name: str, outputs: Channels, *, times: int = 1) -> Iterator[Layer]:
    """Split a ``TimestepEmbedding`` into its layers; it may serve an image several times."""
    return two_linear(name, Channels(FREQUENCIES), outputs, tokens=times)


def attention_layers(
    unit: Unit,
    stream: Channels,
    *,
    has_bias: bool,
    context: tuple[Channels, int] | None = None,
    has_norms: bool = False,
    is_linear: bool = False,
) -> Iterator[Layer]:
    """Split an ``Attention`` into its layers and the two products inside it.

    Args:
        unit: Its heads.
        stream: What it reads and adds to.
        has_bias: Whether queries, keys and values have a bias.
        context: Channels and number of the tokens that keys and values are of; None means those
            of the stream.
        has_norms: Whether queries and keys of all heads are normalized by the same weights.
        is_linear: Whether it sums keys times values, and a norm, over the tokens once for all
            queries (linear attention).
    """
    name, tokens = unit.name, unit.pixels
    inner = Channels(unit.width * unit.channels, name)
    source, length = (stream, tokens) if context is None else context
    summed = unit.channels + 1 if is_linear else length
    yield linear(f"{name}.to_q", stream, inner, tokens=tokens, has_bias=has_bias)
    yield linear(f"{name}.to_k", source, inner, tokens=length, has_bias=has_bias)
    yield linear(f"{name}.to_v", source, inner, tokens=length, has_bias=has_bias)
    if has_norms:
        yield from _head_norms(unit, "norm_q", "norm_k")
    yield _products(unit, summed, tokens)
    yield linear(f"{name}.to_out.0", inner, serving(stream, name), tokens=tokens)


def joint_attention_layers(
    unit: Unit,
    stream: Channels,
    tokens: tuple[int, int],
    *,
    has_norms: bool = False,
    is_last: bool = False,
) -> Iterator[Layer]:
    """Split an ``Attention`` of image and caption to both into its layers and products.

    Args:
        unit: Its heads.
        stream: What it reads of either, and adds to.
        tokens: Those of the image and of the caption.
        has_norms: Whether queries and keys of all heads are normalized by the same weights.
        is_last: Whether it outputs the image's alone.
    """
    name, inner = unit.name, Channels(unit.width * unit.channels, unit.name)
    of_image, of_caption = tokens
    for one in ("to_q", "to_k", "to_v"):
        yield linear(f"{name}.{one}", stream, inner, tokens=of_image)
    if has_norms:
        yield from _head_norms(unit, "norm_q", "norm_k", "norm_added_q", "norm_added_k")
    for one in ("add_q_proj", "add_k_proj", "add_v_proj"):
        yield linear(f"{name}.{one}", stream, inner, tokens=of_caption)
    yield _products(unit, sum(tokens), sum(tokens))
    if not is_last:
        yield linear(f"{name}.to_add_out", inner, serving(stream, name), tokens=of_caption)
    yield linear(f"{name}.to_out.0", inner, serving(stream, name), tokens=of_image)


def _head_norms(unit: Unit, *names: str) -> Iterator[Layer]:
    channels = serving(Channels(unit.channels), unit.name)
    return (vectors(f"{unit.name}.{name}", channels) for name in names)


def _products(unit: Unit, summed: int, tokens: int) -> Layer:
    """Describe the two products inside an attention, which sum over so many values."""
    inner = Channels(unit.width * unit.channels, unit.name)
    products = f"{unit.name}.products"
    return Layer(products, (Channels(2 * summed),), (inner,), 1, tokens, has_weight=False)


def feed_forward_layers(unit: Unit, stream: Channels, activation: str) -> Iterator[Layer]:
    """Split a ``FeedForward`` into its layers."""
    name, inner = unit.name, Channels(unit.width * unit.channels, unit.name)
    outputs = (inner, inner) if activation in TWO_HALVES else (inner,)
    yield linear(f"{name}.net.0.proj", stream, *outputs, tokens=unit.pixels)
    yield linear(f"{name}.net.2", inner, serving(stream, name), tokens=unit.pixels)


def attention_unit(name: str, num_heads: int, head_dim: int, tokens: int) -> Unit:
    """Describe the heads of an ``Attention``."""
    return Unit(name, "attention", num_heads, head_dim, tokens)


def feed_forward_unit(name: str, width: int, tokens: int) -> Unit:
    """Describe the inner channels of a ``FeedForward``, each a step: they have no order."""
    return Unit(name, "feed-forward", width, 1, tokens)


def block_names(settings: TransformerSettings) -> list[str]:
    """Return the dotted names of the blocks."""
    return [f"transformer_blocks.{index}" for index in range(settings.num_layers)]


def block_units(
    settings: TransformerSettings, heads: Mapping[str, tuple[int, int]], width: int
) -> Iterator[Unit]:
    """Yield the units of blocks that are alike, in the order of the forward pass.

    Args:
        settings: Of the network.
        heads: By a name of a block's attentions the number and the channels of its heads.
        width: Inner channels of the feed-forward ``ff`` that follows them.
    """
    for name in block_names(settings):
        for attention, (number, size) in heads.items():
            yield attention_unit(f"{name}.{attention}", number, size, settings.tokens)
        yield feed_forward_unit(f"{name}.ff", width, settings.tokens)

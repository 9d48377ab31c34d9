"""The layers and units of any ``DiTTransformer2DModel``, derived from its config without torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.dit.config_file import DiTConfigFile
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.transformers.layers import (
    attention_layers,
    block_units,
    embedder_layers,
    feed_forward_layers,
    linear,
)
from tdc_ray.models.units import SpaceKind, Unit

ACTIVATIONS = (
    "gelu",
    "gelu-approximate",
    "geglu",
    "geglu-approximate",
    "swiglu",
    "linear-silu",
)


def settings_of(config: Mapping[str, Any]) -> DiTConfigFile:
    """Return a network's settings, with diffusers' defaults for those left out.

    Raises:
        UnsupportedModelError: Its activation is unknown.
    """
    known: Any = {key: config[key] for key in DiTConfigFile.model_fields if key in config}
    dit = DiTConfigFile(**known)
    if dit.activation_fn not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation_fn {dit.activation_fn} is not supported; known are "
            f"{', '.join(ACTIVATIONS)}."
        )
    return dit


def units_of(config: NetworkConfig, kind: SpaceKind = "inner") -> tuple[Unit, ...]:
    """Return the heads and the feed-forward's width of every block, in forward order.

    Raises:
        UnsupportedModelError: The stream is to be pruned, too, or a setting is not supported.
    """
    return block_units(settings_of(config), kind, "attn1")


def all_layers(config: NetworkConfig) -> Sequence[Layer]:
    """Return the layers that have parameters, and products, in the order of the forward pass."""
    return list(_walk(settings_of(config), units_of(config)))


def _walk(dit: DiTConfigFile, units: Sequence[Unit]) -> Iterator[Layer]:
    stream, tokens = Channels(dit.num_attention_heads * dit.attention_head_dim), units[0].pixels
    area, inputs = dit.patch_size**2, dit.in_channels
    outputs = inputs if dit.out_channels is None else dit.out_channels
    yield Layer("pos_embed.proj", (Channels(inputs),), (stream,), area, tokens)
    for heads, feed_forward in zip(units[::2], units[1::2], strict=True):
        block = heads.name.removesuffix(".attn1")
        times = 2 if heads is units[0] else 1  # the first block's embedding serves the end, too
        embedder = f"{block}.norm1.emb.timestep_embedder"
        yield from embedder_layers(embedder, stream.count, times=times)
        table = f"{block}.norm1.emb.class_embedder.embedding_table"
        classes = Channels(dit.num_embeds_ada_norm + 1)
        yield Layer(table, (classes,), (stream,), has_bias=False)
        yield linear(f"{block}.norm1.linear", stream, Channels(6 * stream.count))
        yield from attention_layers(heads, stream, has_bias=dit.attention_bias)
        if dit.norm_elementwise_affine:
            yield Layer(f"{block}.norm3", (Channels(1),), (stream,))
        yield from feed_forward_layers(feed_forward, stream, dit.activation_fn)
    yield linear("proj_out_1", stream, Channels(2 * stream.count))
    yield linear("proj_out_2", stream, Channels(area * outputs), tokens=tokens)

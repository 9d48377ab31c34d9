"""Attentions and feed-forwards of transformers as layers, and what can be pruned of them."""

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.layer import Channels, Layer
from tdc_ray.models.transformers.settings import TransformerSettings
from tdc_ray.models.units import SpaceKind, Unit

FREQUENCIES = 256
"""Channels of a timestep before it is embedded."""

TWO_HALVES = ("geglu", "swiglu")
"""Activations that multiply one half of the first layer's outputs by the other."""


def linear(
    name: str, inputs: Channels, *outputs: Channels, tokens: int = 1, has_bias: bool = True
) -> Layer:
    """Describe a ``Linear`` that is applied to every token, or once."""
    return Layer(name, (inputs,), outputs, pixels=tokens, has_bias=has_bias)


def embedder_layers(name: str, width: int, *, times: int = 1) -> list[Layer]:
    """Split a ``TimestepEmbedding`` into its layers; it may serve an image several times."""
    first = Channels(FREQUENCIES)
    wide = Channels(width)
    return [
        linear(f"{name}.linear_1", first, wide, tokens=times),
        linear(f"{name}.linear_2", wide, wide, tokens=times),
    ]


def attention_layers(
    unit: Unit, stream: Channels, *, has_bias: bool, context: tuple[Channels, int] | None = None
) -> list[Layer]:
    """Split an ``Attention`` into its layers and the two products inside it.

    Args:
        unit: Its heads.
        stream: What it reads and adds to.
        has_bias: Whether queries, keys and values have a bias.
        context: Channels and number of the tokens that keys and values are of; None means those
            of the stream.
    """
    name, tokens = unit.name, unit.pixels
    inner = Channels(unit.width * unit.channels, name)
    source, length = (stream, tokens) if context is None else context
    return [
        linear(f"{name}.to_q", stream, inner, tokens=tokens, has_bias=has_bias),
        linear(f"{name}.to_k", source, inner, tokens=length, has_bias=has_bias),
        linear(f"{name}.to_v", source, inner, tokens=length, has_bias=has_bias),
        Layer(f"{name}.products", (Channels(2 * length),), (inner,), 1, tokens, has_weight=False),
        linear(f"{name}.to_out.0", inner, stream, tokens=tokens),
    ]


def feed_forward_layers(unit: Unit, stream: Channels, activation: str) -> list[Layer]:
    """Split a ``FeedForward`` into its layers."""
    name, inner = unit.name, Channels(unit.width * unit.channels, unit.name)
    outputs = (inner, inner) if activation in TWO_HALVES else (inner,)
    return [
        linear(f"{name}.net.0.proj", stream, *outputs, tokens=unit.pixels),
        linear(f"{name}.net.2", inner, stream, tokens=unit.pixels),
    ]


def attention_unit(name: str, num_heads: int, head_dim: int, tokens: int) -> Unit:
    """Describe the heads of an ``Attention``."""
    return Unit(name, "attention", num_heads, head_dim, tokens)


def feed_forward_unit(name: str, width: int, tokens: int) -> Unit:
    """Describe the inner channels of a ``FeedForward``, each a step: they have no order."""
    return Unit(name, "feed-forward", width, 1, tokens)


def check_inner(kind: SpaceKind) -> None:
    """Check that what is to be pruned are inner units alone.

    Raises:
        UnsupportedModelError: The stream is to be pruned, too.
    """
    if kind == "full":
        raise UnsupportedModelError(
            "a transformer's stream cannot be pruned: set prune.space to inner, which has its "
            "heads and feed-forwards."
        )


def num_patches(sample_size: int, patch_size: int) -> int:
    """Return the number of patches of a square image, which are a transformer's tokens.

    Raises:
        UnsupportedModelError: Patches do not tile it.
    """
    if sample_size % patch_size:
        raise UnsupportedModelError(
            f"a sample_size of {sample_size} is no multiple of the patch_size {patch_size}: set "
            "one that is in the model's config.json."
        )
    return (sample_size // patch_size) ** 2


def block_units(
    settings: TransformerSettings, kind: SpaceKind, *attentions: str
) -> tuple[Unit, ...]:
    """Return the units of blocks that are alike, in the order of the forward pass.

    Args:
        settings: Of the network.
        kind: What is to be pruned.
        attentions: Names of a block's attentions; a feed-forward ``ff`` follows them.

    Raises:
        UnsupportedModelError: The stream is to be pruned, too, or patches do not tile the images.
    """
    check_inner(kind)
    heads, size = settings.num_attention_heads, settings.attention_head_dim
    tokens, units = num_patches(settings.sample_size, settings.patch_size), []
    for name in (f"transformer_blocks.{index}" for index in range(settings.num_layers)):
        units += [attention_unit(f"{name}.{one}", heads, size, tokens) for one in attentions]
        units.append(feed_forward_unit(f"{name}.ff", 4 * heads * size, tokens))
    return tuple(units)

"""``DiTTransformer2DModel`` (arXiv:2212.09748): conditioned on classes by adaLN-Zero."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.layer import Channels, Layer
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
    vectors,
)
from tdc_ray.models.transformers.settings import BasicTransformerSettings
from tdc_ray.models.transformers.transformer import Ends, Transformer
from tdc_ray.models.units import Unit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tdc_ray.models.step import Step
    from tdc_ray.models.transformers.steps import Shift

ACTIVATIONS = (
    "gelu",
    "gelu-approximate",
    "geglu",
    "geglu-approximate",
    "swiglu",
    "linear-silu",
)


class DiTSettings(BasicTransformerSettings):
    """The arguments of ``diffusers.DiTTransformer2DModel``, with its defaults."""

    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"


def _settings_of(config: Mapping[str, Any]) -> DiTSettings:
    known: Any = {key: config[key] for key in DiTSettings.model_fields if key in config}
    dit = DiTSettings(**known)
    if dit.activation_fn not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation_fn {dit.activation_fn} is not supported; known are "
            f"{', '.join(ACTIVATIONS)}."
        )
    return dit


def _units(dit: DiTSettings) -> Iterator[Unit]:
    heads = (dit.num_attention_heads, dit.attention_head_dim)
    return block_units(dit, {"attn1": heads}, 4 * dit.width)


def _layers(dit: DiTSettings, units: Mapping[str, Unit]) -> Iterator[Layer]:
    stream, classes = Channels(dit.width), dit.num_embeds_ada_norm + 1
    yield patch_layer("pos_embed", dit)
    for index, block in enumerate(block_names(dit)):
        branches, embedder = (f"{block}.attn1", f"{block}.ff"), f"{block}.norm1.emb"
        embedding = serving(stream, *branches)
        if index == 0:  # the first block's embedding serves the end, too
            timestep = [*embedder_layers(f"{embedder}.timestep_embedder", embedding)]
            yield from (replace(layer, has_weight=False) for layer in timestep)
            embedding = stream
        yield from embedder_layers(f"{embedder}.timestep_embedder", embedding)
        yield vectors(f"{embedder}.class_embedder.embedding_table", embedding, classes)
        modulation = (serving(Channels(3 * dit.width), branch) for branch in branches)
        yield linear(f"{block}.norm1.linear", stream, *modulation)
        yield from attention_layers(units[f"{block}.attn1"], stream, has_bias=dit.attention_bias)
        if dit.norm_elementwise_affine:
            yield vectors(f"{block}.norm3", serving(stream, f"{block}.ff"), has_bias=True)
        yield from feed_forward_layers(units[f"{block}.ff"], stream, dit.activation_fn)
    yield linear("proj_out_1", stream, Channels(2 * dit.width))
    yield output_layer("proj_out_2", dit)


def _embed(
    dit: Any, x_t: "Tensor", timesteps: "Tensor", class_labels: "Tensor | None"
) -> "tuple[Tensor, None]":
    """Embed timesteps and classes, ``(B,)``, for every block: ``(B, L, E)``.

    A block that was removed has none: that of the one before, which nothing reads, stands there.
    """
    from tdc_ray.models.transformers.steps import stacked

    del x_t
    embeddings: list[Tensor] = []
    for block in dit.transformer_blocks:
        if block.norm1.emb is not None:
            embedding = block.norm1.emb(timesteps, class_labels, hidden_dtype=dit.dtype)
        embeddings.append(embedding)
    return stacked(embeddings), None


def _blocks(dit: Any) -> "Sequence[Step]":
    from tdc_ray.models.transformers.steps import dit_block

    return [
        step
        for index, block in enumerate(dit.transformer_blocks)
        for step in dit_block(f"transformer_blocks.{index}", block, index)
    ]


def _remaining_block(block: Any, gone: Collection[str], is_first: bool) -> "nn.Module":  # noqa: FBT001
    from tdc_ray.models.transformers.remaining import RemainingDiTBlock

    return RemainingDiTBlock(block, gone, keeps_embedding=is_first)  # which serves the end, too


def _last_shift(dit: Any) -> "Shift":
    """Return shift and scale before the last layer, by the first block's embedding."""
    from tdc_ray.models.transformers.steps import shift_of

    return lambda embeddings: shift_of(dit.proj_out_1, embeddings[:, 0])


def _zero_at_first(dit: Any) -> "Iterator[nn.Linear]":
    """Yield gates, so that every block passes on what it reads, and the output (adaLN-Zero)."""
    yield from (block.norm1.linear for block in dit.transformer_blocks)
    yield from (dit.proj_out_1, dit.proj_out_2)


DIT = Transformer(
    name="DiTTransformer2DModel",
    settings_of=_settings_of,
    units=_units,
    layers=_layers,
    ends=Ends("pos_embed", "norm_out", "proj_out_2"),
    embed=_embed,
    blocks=_blocks,
    remaining_block=_remaining_block,
    last_shift=_last_shift,
    zero_at_first=_zero_at_first,
)

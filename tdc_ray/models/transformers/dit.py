"""``DiTTransformer2DModel`` (arXiv:2212.09748): conditioned on classes by adaLN-Zero."""

from collections.abc import Iterator, Mapping, Sequence
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
    vectors,
)
from tdc_ray.models.transformers.settings import BasicTransformerSettings
from tdc_ray.models.transformers.transformer import Ends, Transformer
from tdc_ray.models.units import Unit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tdc_ray.models.step import Step
    from tdc_ray.models.transformers.steps import Modulation, Shift

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
        times = 1 if index else 2  # the first block's embedding serves the end, too
        embedder = f"{block}.norm1.emb"
        yield from embedder_layers(f"{embedder}.timestep_embedder", dit.width, times=times)
        yield vectors(f"{embedder}.class_embedder.embedding_table", stream, classes)
        yield linear(f"{block}.norm1.linear", stream, Channels(6 * dit.width))
        yield from attention_layers(units[f"{block}.attn1"], stream, has_bias=dit.attention_bias)
        if dit.norm_elementwise_affine:
            yield vectors(f"{block}.norm3", stream, has_bias=True)
        yield from feed_forward_layers(units[f"{block}.ff"], stream, dit.activation_fn)
    yield linear("proj_out_1", stream, Channels(2 * dit.width))
    yield output_layer("proj_out_2", dit)


def _embed(
    dit: Any, x_t: "Tensor", timesteps: "Tensor", class_labels: "Tensor | None"
) -> "tuple[Tensor, None]":
    """Embed timesteps and classes, ``(B,)``, for every block: ``(B, L, E)``."""
    from tdc_ray.models.transformers.steps import stacked

    del x_t
    return stacked(
        block.norm1.emb(timesteps, class_labels, hidden_dtype=dit.dtype)
        for block in dit.transformer_blocks
    ), None


def _blocks(dit: Any) -> "Sequence[Step]":
    from tdc_ray.models.transformers.steps import gated_step, modulation_of

    def gate(index: int, part: int) -> "Modulation":
        layer = dit.transformer_blocks[index].norm1.linear
        return lambda embeddings: modulation_of(layer, part, embeddings[:, index])

    steps: list[Step] = []
    for index, block in enumerate(dit.transformer_blocks):
        name = f"transformer_blocks.{index}"
        steps += [
            gated_step(f"{name}.attn1", block.attn1, block.norm1.norm, gate(index, 0)),
            gated_step(f"{name}.ff", block.ff, block.norm3, gate(index, 1)),
        ]
    return steps


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
    last_shift=_last_shift,
    zero_at_first=_zero_at_first,
)

"""Configs of networks: the keyword arguments that diffusers' classes are built with."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from tdc_ray.errors import UnsupportedModelError

Row = TypeVar("Row")

DEFAULT_CLASS = "UNet2DModel"
"""The class of a network whose config names none."""

DIT_CLASS, PIXART_CLASS = "DiTTransformer2DModel", "PixArtTransformer2DModel"
CONDITION_CLASS = "UNet2DConditionModel"


class NetworkConfig(TypedDict, total=False):
    """Keyword arguments of ``diffusers.UNet2DModel``, which has defaults for those left out.

    Those of other classes are read by their own types (``transformers.settings``).
    """

    sample_size: int | tuple[int, int] | None
    in_channels: int
    out_channels: int
    center_input_sample: bool
    time_embedding_type: str
    time_embedding_dim: int | None
    freq_shift: int
    flip_sin_to_cos: bool
    down_block_types: Sequence[str]
    mid_block_type: str | None
    up_block_types: Sequence[str]
    block_out_channels: Sequence[int]
    layers_per_block: int
    mid_block_scale_factor: float
    downsample_padding: int
    downsample_type: str
    upsample_type: str
    dropout: float
    act_fn: str
    attention_head_dim: int | None
    norm_num_groups: int
    attn_norm_num_groups: int | None
    norm_eps: float
    resnet_time_scale_shift: str
    class_embed_type: str | None
    num_class_embeds: int | None
    num_train_timesteps: int | None
    add_attention: bool

    num_heads: int | None
    """Heads of every attention, whatever its width, which ``attention_head_dim`` cannot express;
    no argument of diffusers', but kept beside the weights (``unet2d.unet.HEADS_FILE``)."""

    _class_name: str


class FirstStageConfig(TypedDict, total=False):
    """Keyword arguments of ``diffusers.VQModel`` and ``AutoencoderKL`` that are read here."""

    in_channels: int
    out_channels: int
    down_block_types: Sequence[str]
    up_block_types: Sequence[str]
    block_out_channels: Sequence[int]
    layers_per_block: int
    latent_channels: int
    sample_size: int
    num_vq_embeddings: int
    vq_embed_dim: int | None
    mid_block_add_attention: bool
    scaling_factor: float
    shift_factor: float | None
    _class_name: str


def class_name(config: Mapping[str, Any]) -> str:
    """Return the name of the network's class; configs without one are of a ``UNet2DModel``.

    Released DiTs name the class that all transformers had once.
    """
    name = str(config.get("_class_name", DEFAULT_CLASS))
    is_dit = name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    return DIT_CLASS if is_dit else name


def row_of(table: Mapping[str, Row], name: str) -> Row:
    """Return a network class's row of a table.

    Raises:
        UnsupportedModelError: It has none.
    """
    if name not in table:
        raise UnsupportedModelError(f"a {name} is not supported; known are {', '.join(table)}.")
    return table[name]


def num_class_embeds(config: Mapping[str, Any]) -> int | None:
    """Return how many classes a network embeds, a null class among them; None means none.

    Transformers with adaLN-Zero embed one more than ``num_embeds_ada_norm``: the null class.
    """
    given = config.get("num_embeds_ada_norm")
    if given is not None and config.get("norm_type", "ada_norm_zero") == "ada_norm_zero":
        return int(given) + 1
    embeds: int | None = config.get("num_class_embeds")
    return embeds


def image_size(config: NetworkConfig) -> tuple[int, int]:
    """Return height and width of what a network denoises; some name one number for both.

    Raises:
        UnsupportedModelError: The config does not have them.
    """
    size = config.get("sample_size")
    if size is None:
        raise UnsupportedModelError("the model's config must name a sample_size.")
    height, width = (size, size) if isinstance(size, int) else size
    return height, width

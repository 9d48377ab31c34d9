"""Configs of networks: the keyword arguments that diffusers' classes are built with."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from tdc_ray.errors import UnsupportedModelError

DEFAULT_CLASS = "UNet2DModel"
"""The class of a network whose config names none."""

CONDITION_CLASS = "UNet2DConditionModel"

STATES = "encoder_hidden_states"
"""What all networks that read captions read, beside what one or another does: a state of each
token."""

MASK = "encoder_attention_mask"
"""Which tokens count, 1 or 0: what some read, too."""

CaptionShapes = Mapping[str, tuple[int, ...]]
"""What a network reads of a caption: shapes by the names of its arguments."""


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
    no argument of diffusers', but kept beside the weights (``unet2d.config_file.OWN_FILE``)."""

    num_heads_upsample: int | None
    """Heads of the attentions on the way up, where they are not ``num_heads``."""

    timestep_channels: int | None
    """Channels that a timestep is embedded in before the first linear layer, where they are not as
    many as the first level's: of ADM's networks for 512x512. No argument of diffusers', either."""

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
    sample_size: int | tuple[int, int]
    num_vq_embeddings: int
    vq_embed_dim: int | None
    mid_block_add_attention: bool
    scaling_factor: float
    shift_factor: float | None
    _class_name: str


SHAPES = (
    "sample_size",
    "in_channels",
    "out_channels",
    "num_class_embeds",
    "num_embeds_ada_norm",
)
"""Settings that networks have in common which take each other's place."""

OWN_SETTINGS = ("num_heads", "num_heads_upsample", "timestep_channels")
"""Settings of ``NetworkConfig`` that are no arguments of diffusers'."""


def num_heads_of(config: NetworkConfig, module: str, channels: int) -> int:
    """Return how many heads the attention of a name and a width has, rounded down."""
    upsample = config.get("num_heads_upsample")
    if upsample is not None and module.startswith("up_blocks."):
        return upsample
    return config.get("num_heads") or channels // (config.get("attention_head_dim") or channels)


def class_name(config: Mapping[str, Any]) -> str:
    """Return the name of the network's class; configs without one are of a ``UNet2DModel``.

    Released DiTs and PixArts name the class that all transformers had once.
    """
    name = str(config.get("_class_name", DEFAULT_CLASS))
    if name != "Transformer2DModel":
        return name
    by_norm = {"ada_norm_zero": "DiT", "ada_norm_single": "PixArt"}
    return f"{by_norm.get(str(config.get('norm_type')), '')}{name}"


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
    sides = [*size] if isinstance(size, list | tuple) else [size, size]
    whole = [side for side in sides if isinstance(side, int) and side > 0]
    if len(sides) != 2 or len(whole) != 2:
        raise UnsupportedModelError(
            "the model's config must name a sample_size: one number, or height and width, got "
            f"{size}."
        )
    return whole[0], whole[1]


def sample_size(height: int, width: int) -> int | tuple[int, int]:
    """Return the ``sample_size`` of a config: one number for a square."""
    return height if height == width else (height, width)

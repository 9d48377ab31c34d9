"""The types and ranges of the settings of a ``UNet2DModel``'s ``config.json``."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tdc_ray.config.validation import PositiveInt, Share
from tdc_ray.models.config_types import Size, Width

OWN_FILE = "tdc_heads.json"
"""File beside the weights with what no argument of diffusers' can express, such as the number of
heads where it is not the same everywhere."""


class UNetConfigFile(BaseModel):
    """The arguments of ``diffusers.UNet2DModel``, with its defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sample_size: Size | Annotated[list[Size], Field(min_length=2, max_length=2)] | None = None
    in_channels: Width = 3
    out_channels: Width = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: Width | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: list[str] = ["DownBlock2D"] + ["AttnDownBlock2D"] * 3
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: list[str] = ["AttnUpBlock2D"] * 3 + ["UpBlock2D"]
    block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=12)] = [
        224,
        448,
        672,
        896,
    ]
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 2
    mid_block_scale_factor: Annotated[float, Field(gt=0)] = 1
    downsample_padding: Annotated[int, Field(ge=0, le=1)] = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: Share = 0.0
    act_fn: str = "silu"
    attention_head_dim: Width | None = 8
    norm_num_groups: Width = 32
    attn_norm_num_groups: Width | None = None
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: PositiveInt | None = None
    num_train_timesteps: PositiveInt | None = None
    num_heads: Width | None = None
    """No argument of diffusers', but in a file of its own beside the config where it counts."""

    num_heads_upsample: Width | None = None
    """As ``num_heads``."""

    timestep_channels: Width | None = None
    """As ``num_heads``."""

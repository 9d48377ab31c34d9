"""The types and ranges of the settings that transformers of diffusers have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tdc_ray.config.validation import PositiveInt, Share
from tdc_ray.models.config_types import Size, Width


class TransformerSettings(BaseModel):
    """Arguments of diffusers' classes, with DiT's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_attention_heads: Annotated[int, Field(ge=1, le=256)] = 16
    attention_head_dim: Width = 72
    in_channels: Width = 4
    out_channels: Width | None = None
    num_layers: Annotated[int, Field(ge=1, le=256)] = 28
    dropout: Share = 0.0
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: Size = 32
    patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: PositiveInt = 1000
    upcast_attention: bool = False
    norm_elementwise_affine: bool = False
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5

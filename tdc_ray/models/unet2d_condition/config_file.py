"""The types and ranges of the settings of a ``UNet2DConditionModel``'s ``config.json``."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from tdc_ray.config.validation import Share
from tdc_ray.models.config_types import Size, Width

Depth = Annotated[int, Field(ge=1, le=64)]


class UNetConditionConfigFile(BaseModel):
    """The arguments of ``diffusers.UNet2DConditionModel``, with its defaults.

    Of those that change layers, values that are not described (``layers``) are refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    sample_size: Size | Annotated[list[Size], Field(min_length=2, max_length=2)] | None = None
    in_channels: Width = 4
    out_channels: Width = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: list[str] = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: list[str] = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    only_cross_attention: Literal[False] = False
    block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=12)] = [
        320,
        640,
        1280,
        1280,
    ]
    layers_per_block: Depth = 2
    downsample_padding: Annotated[int, Field(ge=0, le=1)] = 1
    mid_block_scale_factor: Annotated[float, Field(gt=0)] = 1
    dropout: Share = 0.0
    act_fn: str = "silu"
    norm_num_groups: Width = 32
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    cross_attention_dim: Width = 1280
    transformer_layers_per_block: Depth | list[Depth] = 1
    reverse_transformer_layers_per_block: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: Width | list[Width] = 8
    num_attention_heads: None = None
    dual_cross_attention: Literal[False] = False
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: Width | None = None
    num_class_embeds: None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: Literal["default"] = "default"
    resnet_skip_time_act: Literal[False] = False
    resnet_out_scale_factor: Annotated[float, Field(gt=0)] = 1.0
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: None = None
    conv_in_kernel: Literal[3] = 3
    conv_out_kernel: Literal[3] = 3
    projection_class_embeddings_input_dim: Width | None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: Literal[False] | None = None
    cross_attention_norm: None = None
    addition_embed_type_num_heads: Width = 64

    @field_validator("norm_num_groups", "mid_block_type", mode="before")
    @classmethod
    def _is_there(cls, value: object) -> object:
        """Say why what diffusers allows is refused."""
        if value is None:
            raise PydanticCustomError(
                "missing",
                "Input should be set: the layers of a network without norms, or without a middle "
                "block, are not described here",
            )
        return value

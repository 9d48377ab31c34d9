"""The types and ranges of the settings that transformers of diffusers have in common."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from tdc_ray.config.validation import PositiveInt, Share
from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.config_types import Size, Width


class TransformerSettings(BaseModel):
    """Arguments of diffusers' classes for transformers of square patches."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_attention_heads: Annotated[int, Field(ge=1, le=256)]
    attention_head_dim: Width
    in_channels: Width
    out_channels: Width | None = None
    num_layers: Annotated[int, Field(ge=1, le=256)]
    sample_size: Size
    patch_size: Annotated[int, Field(ge=1, le=64)] = 2

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Return the settings of a config, with diffusers' defaults for those left out.

        A network that diffusers loaded keeps settings of its file that its class does not know.
        """
        known: Any = {key: config[key] for key in cls.model_fields if key in config}
        return cls(**known)

    @property
    def width(self) -> int:
        """Channels of the stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def tokens(self) -> int:
        """Patches of a square image.

        Raises:
            UnsupportedModelError: They do not tile it.
        """
        if self.sample_size % self.patch_size:
            raise UnsupportedModelError(
                f"a sample_size of {self.sample_size} is no multiple of the patch_size "
                f"{self.patch_size}: set one that is in the model's config.json."
            )
        return (self.sample_size // self.patch_size) ** 2


class BasicTransformerSettings(TransformerSettings):
    """Those of ``BasicTransformerBlock``, with DiT's defaults."""

    num_attention_heads: Annotated[int, Field(ge=1, le=256)] = 16
    attention_head_dim: Width = 72
    in_channels: Width = 4
    num_layers: Annotated[int, Field(ge=1, le=256)] = 28
    dropout: Share = 0.0
    norm_num_groups: int = 32
    attention_bias: bool = True
    sample_size: Size = 32
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: PositiveInt = 1000
    upcast_attention: bool = False
    norm_elementwise_affine: bool = False
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5

"""The types and ranges of the settings of a ``DiTTransformer2DModel``'s ``config.json``."""

from typing import Literal

from tdc_ray.models.transformers.settings import TransformerSettings


class DiTConfigFile(TransformerSettings):
    """The arguments of ``diffusers.DiTTransformer2DModel``, with its defaults."""

    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"

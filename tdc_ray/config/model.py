"""The base: its architecture, or where it comes from: ``--model.*``."""

import re
from typing import Annotated

from tyro.conf import arg

from tdc_ray.config.validation import PositiveInt, Share, settings
from tdc_ray.errors import ConfigError

FILE_KINDS = ("openai", "compvis")
"""Prefixes of bases that are checkpoint files of other projects."""


HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""Owner and name of a repository on the Hugging Face hub."""


@settings("model")
class ModelConfig:
    """The base denoiser."""

    architecture: str = "digits"
    """A name from `tdc_ray.models.unet2d.architectures`."""

    dropout: Share = 0.0
    """Dropout inside the residual blocks, in [0, 1)."""

    base: Annotated[str | None, arg(aliases=("--base",))] = None
    """A base to start from in place of training one: a diffusers folder (pipeline or UNet2DModel),
    a name on the Hugging Face hub, a run directory, what tdc-ray import wrote, openai:FILE.pt or
    compvis:FILE.ckpt. Then its own architecture counts."""

    num_heads: PositiveInt | None = None
    """Heads of every attention of a base from openai: or compvis:, whose file does not say; None
    means as many as `architecture` has, if the base is of that."""

    def __post_init__(self) -> None:
        if self.num_heads is not None and self.base is None:
            raise ConfigError(
                f"model.num_heads goes with model.base, got {self.num_heads} without one: "
                "model.architecture has its own."
            )

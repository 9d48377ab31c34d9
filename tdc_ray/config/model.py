"""The base: its architecture, or where it comes from: ``--model.*``."""

from typing import Annotated, Any

from tyro.conf import Fixed, Suppress, arg

from tdc_ray.config.validation import PositiveFloat, PositiveInt, Share, refuse, require, settings

FILE_KINDS = ("openai", "compvis")
"""Prefixes of bases that are checkpoint files of other projects."""

AUTO = "auto"
"""The architecture that is chosen by the images."""

ATTENTIONS = ("num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order")
"""Fields of ``ModelConfig`` that describe the attentions of a checkpoint file."""


@settings("model")
class ModelConfig:
    """The base denoiser."""

    architecture: str = "digits"
    """A name from `tdc_ray.models.unet2d.architectures`, or auto: chosen by size, channels and
    number of images from the family in `tdc_ray.models.unet2d.auto`, once a run."""

    width: PositiveFloat = 1.0
    """Factor of the channels of architecture auto."""

    depth: PositiveInt | None = None
    """Residual blocks per level of architecture auto; None means the family's."""

    config: str | None = None
    """The config.json of a diffusers UNet2DModel, DiTTransformer2DModel or UNet2DConditionModel
    (which reads captions: `data.text_encoder`), or its folder, in place of `architecture`: that
    network is trained from scratch. Its content counts for a run, wherever the file lies."""

    network: Annotated[dict[str, Any] | None, Fixed, Suppress] = None
    """The network's settings once a run has chosen them (architecture auto) or read them
    (`config`); no flag."""

    dropout: Share = 0.0
    """Dropout inside the residual blocks, in [0, 1)."""

    base: Annotated[str | None, arg(aliases=("--base",))] = None
    """A base to start from in place of training one: a diffusers folder (pipeline, UNet2DModel or
    DiTTransformer2DModel), OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub, a run
    directory, what tdc-ray import wrote, openai:FILE.pt or compvis:FILE.ckpt. Then its own
    architecture counts."""

    num_heads: PositiveInt | None = None
    """Heads of every attention of a base from openai: or compvis:, whose file does not say; None
    means as many as `architecture` has, if the base is of that."""

    num_head_channels: PositiveInt | None = None
    """Channels of each head of such a base, in place of num_heads."""

    num_heads_upsample: PositiveInt | None = None
    """Heads of such a base on the way up; None means num_heads."""

    use_new_attention_order: bool = False
    """Such a base was trained with use_new_attention_order: q, k and v are split before heads."""

    def __post_init__(self) -> None:
        rule = "left at its default without model.architecture auto"
        scaled = self.architecture == AUTO and self.config is None
        require("model", self, "width", rule, ok=scaled or self.width == 1)
        require("model", self, "depth", rule, ok=scaled or self.depth is None)
        rule = "None with model.base, which has its own"
        require("model", self, "config", rule, ok=self.config is None or self.base is None)
        if self.attentions and self.base is None:
            name, value = next(iter(self.attentions.items()))
            refuse(
                f"model.{name} goes with model.base, got {value} without one: "
                "model.architecture has its own."
            )
        rule = "None with model.num_heads, in place of which it is given"
        alone = self.num_heads is None and self.num_heads_upsample is None
        require(
            "model", self, "num_head_channels", rule, ok=alone or self.num_head_channels is None
        )
        rule = "given together with model.num_heads"
        ok = self.num_heads is not None or self.num_heads_upsample is None
        require("model", self, "num_heads_upsample", rule, ok=ok)

    @property
    def attentions(self) -> dict[str, int]:
        """What is said of the attentions of a checkpoint file, which does not say it, by name."""
        values = {name: getattr(self, name) for name in ATTENTIONS}
        return {name: value for name, value in values.items() if value}

    @property
    def name(self) -> str:
        """What errors and logs call the network that is trained."""
        if self.config is not None:
            return f"model.config {self.config}"
        return f"model.architecture {self.architecture}"

    @property
    def is_open(self) -> bool:
        """Whether the network that is trained is yet to be chosen, or read from its file."""
        asked = self.config is not None or self.architecture == AUTO
        return asked and self.base is None and self.network is None

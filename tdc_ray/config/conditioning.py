"""Class conditioning: which classes a model is told, and which class stands for none of them."""

from dataclasses import dataclass

from tdc_ray.config.train import at_least, require
from tdc_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """What the base and the experts are told of an image beside its timestep."""

    num_classes: int | None = None
    """Number of classes of the labels that the model is told; None: it is unconditional."""

    label_dropout: float = 0.0
    """Share of the training images whose label is replaced by the null class, in [0, 1). Above 0 a
    named architecture embeds that class too, as its last, and can be sampled with guidance
    (arXiv:2207.12598)."""

    def __post_init__(self) -> None:
        at_least(1, "conditioning", self, "num_classes")
        rule = "in [0, 1), and 0 without conditioning.num_classes"
        fits = self.label_dropout == 0 or (self.num_classes and 0 < self.label_dropout < 1)
        require("conditioning", self, "label_dropout", rule, ok=bool(fits))

    @property
    def num_class_embeds(self) -> int | None:
        """Classes that a named architecture embeds, the null class among them."""
        if self.num_classes is None:
            return None
        return self.num_classes + (1 if self.label_dropout else 0)


def null_class(num_class_embeds: int | None, num_classes: int | None) -> int | None:
    """Give the class that stands for no class: the last, one more than there are; or None."""
    has_one = num_classes is not None and num_class_embeds == num_classes + 1
    return num_classes if has_one else None


def check_conditioning(
    config: ConditioningConfig,
    *,
    guidance_scale: float,
    num_class_embeds: int | None,
    num_data_classes: int | None,
) -> None:
    """Find out before any work whether model, labels and guidance can go together.

    Args:
        config: The settings.
        guidance_scale: That of sampling; 1 is none.
        num_class_embeds: Classes that the base embeds; None: it is unconditional.
        num_data_classes: Classes of the data; None: it has no labels, or not for all.

    Raises:
        ConfigError: They cannot.
    """
    embeds, num_classes = num_class_embeds, config.num_classes
    if embeds is None and num_classes is not None:
        raise ConfigError(
            "conditioning.num_classes must be None for this base, which is unconditional, got "
            f"{num_classes}. Leave it out, or give a base that embeds classes."
        )
    if embeds is not None and num_classes not in (embeds, embeds - 1):
        raise ConfigError(
            f"conditioning.num_classes must be {embeds} for this base, or {embeds - 1} if the "
            f"last of the classes it embeds stands for no class, got {num_classes}. Set "
            "--conditioning.num-classes to what it was trained with."
        )
    if null_class(embeds, num_classes) is None:
        for name, value, none in (
            ("conditioning.label_dropout", config.label_dropout, 0),
            ("sampler.guidance_scale", guidance_scale, 1),
        ):
            if value != none:
                raise ConfigError(
                    f"{name} must be {none} for a base without a null class, got {value}. Train "
                    "a base with --conditioning.num-classes and --conditioning.label-dropout "
                    "above 0."
                )
    if num_classes is not None and num_data_classes is None:
        raise ConfigError(
            "data must have a label from 0 on for every image with conditioning.num_classes "
            f"{num_classes}, and has none, or not for all (a warning then says of how many). Set "
            "--data.labels-from-folders, put labels into the npz files, or leave "
            "--conditioning.num-classes out and use an unconditional base."
        )
    if num_classes is not None and num_data_classes is not None and num_data_classes > num_classes:
        raise ConfigError(
            "conditioning.num_classes must be above every label of the data, which go up to "
            f"{num_data_classes - 1}, got {num_classes}."
        )

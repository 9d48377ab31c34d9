"""Class conditioning, and what stands for no class or caption: ``--conditioning.*``."""

from tdc_ray.config.validation import PositiveInt, Share, require, settings


@settings("conditioning")
class ConditioningConfig:
    """What the base and the experts are conditioned on beside the timestep."""

    num_classes: PositiveInt | None = None
    """Number of classes that the model is conditioned on; None means that it is unconditional."""

    label_dropout: Share = 0.0
    """Share of the training images whose label is replaced by the null class, in [0, 1). Above 0 a
    named architecture embeds that class too, as its last, and can be sampled with guidance
    (arXiv:2207.12598)."""

    caption_dropout: Share = 0.0
    """Share of the training images, of base and experts, whose caption is replaced by the empty
    prompt, in [0, 1), for guidance of models that are conditioned on text."""

    def __post_init__(self) -> None:
        known = not self.label_dropout or self.num_classes is not None
        rule = "0 without conditioning.num_classes"
        require("conditioning", self, "label_dropout", rule, ok=known)

    @property
    def num_class_embeds(self) -> int | None:
        """Number of classes that a named architecture embeds, the null class among them."""
        if self.num_classes is None:
            return None
        return self.num_classes + (1 if self.label_dropout else 0)


def null_class(num_class_embeds: int | None, num_classes: int | None) -> int | None:
    """Return the null class: the last, if a model embeds one more than there are; else None."""
    has_one = num_classes is not None and num_class_embeds == num_classes + 1
    return num_classes if has_one else None

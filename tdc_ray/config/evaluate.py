"""How the base and the experts are scored: ``--evaluate.*``."""

from typing import Annotated, Literal

from pydantic import Field

from tdc_ray.config.train import FixedPrecision
from tdc_ray.config.validation import PositiveInt, require, settings

Features = Literal["auto", "inception", "classifier", "clip", "dinov2", "none"]
Metric = Literal["kid", "precision-recall"]

HUB_MODELS = {"clip": "openai/clip-vit-large-patch14", "dinov2": "facebook/dinov2-large"}
"""Features of transformers' networks, and which these are unless another is named."""


@settings("evaluate")
class EvaluateConfig:
    """How the base and the experts are scored."""

    num_images: Annotated[int, Field(ge=2)] = 50_000
    """Images sampled from each model and scored. With features none: noised images of each group
    that losses are of, and 64 images at most are sampled, to be seen."""

    batch_size: PositiveInt = 250
    """Images sampled at once."""

    seed: int = 0
    """Seed of the initial noise, the same for the base and the experts."""

    precision: FixedPrecision = "fp32"
    """Precision of the denoisers' weights and computation while the scored images are sampled; a
    score depends a little on it. Features, a first stage and measured times keep their own."""

    features: Features = "auto"
    """What measures all scores, and names them. auto: Inception where its weights are available,
    else a small classifier trained on the data's labels, else none; clip and dinov2: transformers'
    (an extra: pip install 'tdc-ray[features]'); none: no image is scored, and models are compared
    by their denoising loss on held-out images."""

    features_model: str | None = None
    """The network of clip or dinov2: a folder with config.json and model.safetensors, or a name on
    the Hugging Face hub; None means openai/clip-vit-large-patch14, or facebook/dinov2-large."""

    metrics: tuple[Metric, ...] = ("kid", "precision-recall")
    """Scores beside the Frechet distance, on 10,000 images at most. They take seconds, up to a
    minute of a core for Inception's features. kid: the kernel distance (arXiv:1801.01401), without
    bias for few images; precision-recall: which share of the samples lies among the images, and
    the reverse (arXiv:1904.06991)."""

    inception_path: str | None = None
    """The folder that holds inception-2015-12-05.pt; None means the cache, then the network."""

    cache_dir: str = "~/.cache/tdc_ray"
    """Where Inception, trained classifiers and moments of training images are kept for all runs;
    on a cluster it must be a place that all nodes see."""

    reference: str | None = None
    """Name of clean-fid's ready statistics of the training split (cifar10); None means those of
    the data."""

    def __post_init__(self) -> None:
        unread = self.features not in ("auto", "inception") and self.inception_path is not None
        rule = "left out, or features inception or auto: others do not read it"
        require("evaluate", self, "inception_path", rule, ok=not unread)
        known = self.features_model is None or self.features in HUB_MODELS
        rule = "left out, or features clip or dinov2: others do not read it"
        require("evaluate", self, "features_model", rule, ok=known)
        named = self.features == "none" and self.reference is not None
        rule = "left out with features none, where no image is scored"
        require("evaluate", self, "reference", rule, ok=not named)
        once = len(set(self.metrics)) == len(self.metrics)
        require("evaluate", self, "metrics", "none of them twice", ok=once)

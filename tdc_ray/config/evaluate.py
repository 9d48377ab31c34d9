"""How the base and the experts are scored: ``--evaluate.*``."""

from typing import Annotated, Literal

from pydantic import Field

from tdc_ray.config.train import FixedPrecision
from tdc_ray.config.validation import PositiveInt, require, settings


@settings("evaluate")
class EvaluateConfig:
    """How the base and the experts are scored."""

    num_images: Annotated[int, Field(ge=2)] = 50_000
    """Images sampled from each model."""

    batch_size: PositiveInt = 250
    """Images sampled at once."""

    seed: int = 0
    """Seed of the initial noise, the same for the base and the experts."""

    precision: FixedPrecision = "fp32"
    """Precision of the denoisers' weights and computation while the scored images are sampled; a
    score depends a little on it. Features, a first stage and measured times keep their own."""

    features: Literal["auto", "inception", "classifier"] = "auto"
    """What measures the Frechet distance. auto: Inception where its weights are available, else a
    small classifier trained on the data's labels, which then names the metric."""

    inception_path: str | None = None
    """The folder that holds inception-2015-12-05.pt; None means the cache, then the network."""

    cache_dir: str = "~/.cache/tdc_ray"
    """Where Inception, trained classifiers and moments of training images are kept for all runs;
    on a cluster it must be a place that all nodes see."""

    reference: str | None = None
    """Name of clean-fid's ready statistics of the training split (cifar10); None means those of
    the data."""

    def __post_init__(self) -> None:
        unread = self.features == "classifier" and self.inception_path is not None
        rule = "left out, or features inception or auto: a classifier does not read it"
        require("evaluate", self, "inception_path", rule, ok=not unread)

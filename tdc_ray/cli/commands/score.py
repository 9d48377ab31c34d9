"""``tdc-ray score``."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from tdc_ray.cli.paths import check_features_model, check_named_data, check_output_file
from tdc_ray.config.evaluate import EvaluateConfig, Features, Metric
from tdc_ray.config.image_size import ImageSize
from tdc_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScoreCommand:
    """Score any images as a run's are scored: by the same features, under the same name.

    Images that another method sampled can so be compared with a run's. They are compared as they
    are, and must have the reference's size and colours.
    """

    images: Positional[Path]
    """An npz file (images or arr_0, uint8, NHWC), a folder of npz files such as
    RUN_DIR/evaluation/tdc, or a folder of images; or its URI."""
    reference: str
    """What they are compared with: a run directory, whose features and training images are taken;
    or training images: digits, photos, an npz file, a folder of npz files or of images, or
    CIFAR-10's."""
    out: Path | None = None
    """JSON file that the score, and all that it depends on, is written to; or its URI."""
    image_size: Annotated[ImageSize | None, arg(name="data.image-size")] = None
    """Size that training images are brought to, as by a run; default: their own."""
    labels_from_folders: Annotated[bool, arg(name="data.labels-from-folders")] = False
    """The subfolders of training images are their classes, which a classifier needs."""
    features: Annotated[Features | None, arg(name="evaluate.features")] = None
    """What measures the distance to training images. auto: Inception where its weights are
    available, else a small classifier trained on their labels; clip, dinov2: transformers'
    networks; default: auto."""
    features_model: Annotated[str | None, arg(name="evaluate.features-model")] = None
    """Folder or hub name of the network of clip or dinov2; default: the run's, or a ViT-L/14 from
    the hub."""
    metrics: Annotated[tuple[Metric, ...] | None, arg(name="evaluate.metrics")] = None
    """Scores beside the Frechet distance; default: the run's, or both."""
    inception_path: Annotated[str | None, arg(name="evaluate.inception-path")] = None
    """The folder that holds inception-2015-12-05.pt; default: the run's, the cache, the
    network."""
    cache_dir: Annotated[str | None, arg(name="evaluate.cache-dir")] = None
    """Where Inception, classifiers and moments of training images are kept; default: the run's, or
    ~/.cache/tdc_ray."""
    batch_size: Annotated[int | None, arg(name="evaluate.batch-size")] = None
    """Images whose features are computed at once; default: the run's, or 250."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_named_data("IMAGES", str(self.images))
        check_named_data("--reference", self.reference)
        if self.out is not None:
            check_output_file("--out", self.out)

    def execute(self, console: Console) -> None:
        """Score the images and print what came out."""
        from tdc_ray.runs.score_images import data_reference, run_reference, score_images
        from tdc_ray.storage.files import write_json
        from tdc_ray.storage.object_store import display_path, resolve_path

        changes = {
            name: getattr(self, name)
            for name in (
                "features",
                "features_model",
                "metrics",
                "inception_path",
                "cache_dir",
                "batch_size",
            )
            if getattr(self, name) is not None
        }
        reference = run_reference(self.reference)
        if reference is None:
            reference = data_reference(
                self.reference,
                EvaluateConfig(**changes),
                image_size=self.image_size,
                labels_from_folders=self.labels_from_folders,
            )
        else:
            is_scored = reference.features != "none"
            self._refuse_for_a_run(is_scored=is_scored)
            features = reference.features if is_scored else self.features or "auto"
            evaluate = replace(reference.evaluate, **changes)
            reference = replace(reference, evaluate=evaluate, features=features)
        check_features_model(reference.evaluate)
        score = score_images(self.images, reference)
        console.print(
            f"{score.metric} {score.score:.4g} (lower is better): {score.num_images} images in "
            f"{score.images} against {score.reference}",
            soft_wrap=True,
        )
        for name, value in score.metrics.items():
            better = "higher" if name.startswith(("precision", "recall")) else "lower"
            console.print(f"{name} {value:.4g} ({better} is better)", soft_wrap=True)
        console.print(f"features: {score.features}", soft_wrap=True)
        for note in score.notes:
            console.print(f"note: {note}", soft_wrap=True)
        if self.out is not None:
            write_json(resolve_path(self.out), asdict(score))
            console.print(f"written: {display_path(self.out)}", soft_wrap=True)

    def _refuse_for_a_run(self, *, is_scored: bool) -> None:
        """Refuse what a run has decided already.

        Args:
            is_scored: Whether its images are, by features that it chose.

        Raises:
            ConfigError: It was given.
        """
        for flag, value in (
            ("data.image-size", self.image_size),
            ("data.labels-from-folders", self.labels_from_folders or None),
            ("evaluate.features", self.features),
            ("evaluate.features-model", self.features_model),
        ):
            if value is not None and (is_scored or not flag.startswith("evaluate")):
                raise ConfigError(
                    f"--{flag} must be left out where the reference is a run, got {value}: images "
                    "are scored as the run's own. Name its training images to score otherwise."
                )

"""The score of any images, as a run's evaluation would give it: ``tdc-ray score``."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from tdc_ray.config.data import BUNDLED, DataConfig
from tdc_ray.config.evaluate import EvaluateConfig
from tdc_ray.config.run import from_json
from tdc_ray.data.dataset import ImageDataset
from tdc_ray.data.detect import data_config
from tdc_ray.data.load import load_dataset
from tdc_ray.data.shapes import stored_shapes
from tdc_ray.errors import ConfigError, DataError, EvaluationError
from tdc_ray.execution.chain import run_chain
from tdc_ray.runs.evaluation.evaluate import (
    Which,
    features_of,
    named_metrics,
    prepare_features,
)
from tdc_ray.runs.evaluation.features import find_features
from tdc_ray.runs.evaluation.metrics import distance, drawn
from tdc_ray.runs.results import few_images_note
from tdc_ray.storage.files import exists, fetch, listing, read_json
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What images are compared with, and how."""

    data: DataConfig
    """The training images, and the shape that they are brought to."""

    evaluate: EvaluateConfig
    features: str
    """``inception``, ``classifier`` or ``auto``."""

    run_dir: RunDir | None = None
    """The run whose evaluation is repeated. None means that images alone were named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScore:
    """The score of a set of images, and everything that it depends on."""

    images: str
    """Where they are."""

    num_images: int
    metric: str
    """Name of the score, as in a run's results."""

    score: float
    """Lower is better."""

    metrics: Mapping[str, float]
    """Scores beside it, by their names in a run's results."""

    reference: str
    """What the images are compared with."""

    features: str
    """What computed the features."""

    notes: tuple[str, ...]
    """What a reader of the score should know."""


def run_reference(name: str) -> Reference | None:
    """Return what a run's images are compared with, or None where a name is no run directory's.

    Raises:
        ConfigError: Its settings are of another version.
    """
    run_dir = RunDir(resolve_path(name))
    if not exists(run_dir.config):
        return None
    config = from_json(read_json(run_dir.config))
    features = config.evaluate.features
    if exists(run_dir.features):
        features = read_json(run_dir.features)["features"]
    return Reference(
        data=config.data, evaluate=config.evaluate, features=features, run_dir=run_dir
    )


def data_reference(
    name: str,
    evaluate: EvaluateConfig,
    *,
    image_size: int | tuple[int, int] | None,
    labels_from_folders: bool,
) -> Reference:
    """Return training images to compare with.

    Args:
        name: ``digits``, an npz file, a folder of npz files or of images, or CIFAR-10's.
        evaluate: Features and caches.
        image_size: What they are brought to; None means their own size.
        labels_from_folders: Whether the subfolders of a folder of images are its classes.

    Raises:
        ConfigError: It is none of these.
        DataError: It holds no image.
    """
    found = _named(name, DataConfig(cache_dir=evaluate.cache_dir), "--reference")
    found = replace(found, labels_from_folders=labels_from_folders)
    _, (channels, height, width) = next(stored_shapes(found))
    size = (height, width) if image_size is None else image_size
    data = replace(found, image_size=size, num_channels=1 if channels == 1 else 3)
    return Reference(data=data, evaluate=evaluate, features=evaluate.features)


def score_images(path: Path, reference: Reference) -> ImageScore:
    """Compute the Frechet distance of images, by the features that a run would be scored on.

    The images are compared as they are, of the reference's size and colours: resizing them would
    be part of their score.

    Args:
        path: An npz file of uint8 images, a folder of such, or a folder of images; or its URI.
        reference: What they are compared with.

    Raises:
        ConfigError: The path holds no images.
        DataError: They are of another size or colours than the reference, or cannot be read.
        EvaluationError: They are fewer than two, or there is no extractor of features.
    """
    images = open_images(path, reference.data)
    if len(images) < 2:
        raise EvaluationError(
            f"{path} must hold at least 2 images, got {len(images)}: their features have no "
            "covariance otherwise, and a score that says something takes thousands."
        )
    evaluate = reference.evaluate
    spec = find_features(reference.data, evaluate, reference.features)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = reference.run_dir
        if run_dir is None or not exists(run_dir.reference):  # a run that is not finished
            run_dir = RunDir(Path(folder))
        source = run_chain(prepare_features(run_dir, reference.data, evaluate, spec))
        with np.load(fetch(run_dir.reference), allow_pickle=False) as file:
            expected = (file["mean"], file["covariance"])
    indices, kept = range(len(images)), drawn(len(images))
    moments, features = features_of(images, indices, spec, evaluate.batch_size, kept)
    return ImageScore(
        images=display_path(path),
        num_images=len(images),
        metric=spec.metric,
        score=distance(moments.mean_and_covariance(), expected),
        metrics=named_metrics(features, spec, evaluate.metrics),
        reference=source,
        features=spec.extractor,
        notes=tuple(_notes(len(images), len(expected[0]), reference)),
    )


def _notes(num_images: int, num_features: int, reference: Reference) -> Sequence[str]:
    """Write what makes the score differ from others: it falls with the number of images."""
    notes = []
    if note := few_images_note(num_images, num_features):
        notes.append(note)
    theirs = reference.evaluate.num_images
    if reference.run_dir is not None and theirs != num_images:
        notes.append(
            f"the run's own scores are of {theirs} images, this one of {num_images}: fewer images "
            "score worse"
        )
    return notes


def open_images(path: Path, like: DataConfig) -> ImageDataset:
    """Open the images to score, all of the shape that the reference is brought to.

    Raises:
        ConfigError: The path holds no images, or those of several models.
        DataError: One of them is of another shape, or cannot be read.
    """
    shape = DataConfig(
        image_size=like.image_size,
        num_channels=like.num_channels,
        max_corrupt=0,
        cache_dir=like.cache_dir,
    )
    run_dir = RunDir(resolve_path(path))
    if exists(run_dir.config) and exists(run_dir.timeline):
        folders = sorted({file.parent for file in listing(run_dir.samples, "*/*.npz")})
        names = " or ".join(
            display_path(folder) for folder in folders if folder.name in get_args(Which)
        )
        way_out = f"name the samples of one, {names}" if names else "finish it, or name others"
        raise ConfigError(
            f"IMAGES must be images of one model, and {display_path(path)} is a run: {way_out}."
        )
    data = _named(str(fetch(resolve_path(path))), shape, "IMAGES")
    for name, stored in stored_shapes(data):
        if stored != like.shape:
            raise DataError(
                f"{name} must have the reference's channels, height and width {like.shape}, got "
                f"{stored}. Score images as they were sampled, against a reference of their size."
            )
    return load_dataset(data)


def _named(source: str, data: DataConfig, argument: str) -> DataConfig:
    """Return settings of the data that an argument names.

    Raises:
        ConfigError: It names none.
    """
    if source not in BUNDLED and not resolve_path(source).exists():
        raise ConfigError(f"{argument} {source} does not exist.")
    return data_config(source, data, argument)

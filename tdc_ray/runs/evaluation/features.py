"""Feature extractors for scores: Inception, a small classifier, CLIP or DINOv2.

The distance is clean-fid's. It is called FID only with Inception's features; with those of a small
classifier it is named after the classifier and can be compared with nothing else.
"""

import functools
import hashlib
import logging
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch
from cleanfid.downloads_helper import check_download_inception, inception_url
from cleanfid.features import get_reference_statistics
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from tdc_ray.config.data import BASE_SAMPLES, DataConfig
from tdc_ray.config.evaluate import HUB_MODELS, EvaluateConfig
from tdc_ray.data.batches import batches, to_minus_one_one
from tdc_ray.data.dataset import ImageDataset
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.errors import ConfigError, EvaluationError, StorageError
from tdc_ray.runs.evaluation.hub_features import (
    HubKind,
    check_folder,
    hub_extractor_name,
    hub_folder,
    load_hub_extractor,
)
from tdc_ray.storage.files import atomic_path, exists, fetch, read_json, write_json
from tdc_ray.storage.object_store import display_path, resolve_path

logger = logging.getLogger(__name__)

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_REMEDY = (
    f"Download {inception_url} where there is a network, and name its folder by "
    "--evaluate.inception-path."
)
UNSCORED_REMEDY = (
    "Or let no image be scored, and models be compared by their losses: --evaluate.features none."
)
DOWNLOAD_TIMEOUT_S = 20.0
CLASSIFIER_VERSION = 1
"""Rises whenever the classifier or its training changes, so that cached ones are trained again."""

CLASSIFIER_STEPS = 600
CLASSIFIER_BATCH = 64
NUM_FEATURES = 64


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """The features that a run is scored on, and the path of their extractor."""

    metric: str
    """Name of the score: ``fid``, or ``fd_<dataset>_cnn``; ``fd_base_samples_...`` of any features
    where images are compared with the base's own."""

    extractor: str
    """The extractor, in words."""

    path: Path
    """Inception's folder, or the classifier's file, which may not exist before its training."""

    moments_path: Path
    """File of the moments of the training images' features."""

    features_path: Path
    """File of these features themselves, of up to 10,000 of the images."""

    kind: Literal["inception", "classifier", "clip", "dinov2"]
    num_classes: int | None = None
    """Classes of the classifier; None of others."""

    def name_of(self, metric: str) -> str:
        """Return the name of a metric on these features: ``kid`` is Inception's, as ``fid`` is.

        Args:
            metric: ``kd``, ``precision`` or ``recall``.
        """
        if self.metric == "fid":
            return "kid" if metric == "kd" else metric
        return f"{metric}_{self.metric.removeprefix('fd_')}"


Extractor = Callable[[Tensor], FloatArray]
"""Computes features, float64 ``(B, D)``, of uint8 images ``(B, C, H, W)``."""


def choose_features(data: DataConfig, evaluate: EvaluateConfig, path: Path) -> FeatureSpec | None:
    """Choose the features of a run, once: what the network or the cache has may change.

    Args:
        data: The training images.
        evaluate: The requested features, and the folders that may have them.
        path: File of the choice, for later calls.

    Returns:
        The features. None means that no image is scored: as requested, or by ``auto`` where
        neither Inception's weights nor labels for a classifier are available.

    Raises:
        ConfigError: A classifier is requested, and there are no labels.
        EvaluationError: The requested features are not available.
    """
    wanted = read_json(path)["features"] if exists(path) else evaluate.features
    spec = _available_features(data, evaluate, wanted)
    write_json(path, {"features": "none" if spec is None else spec.kind})
    return spec


def check_labels(data: DataConfig, evaluate: EvaluateConfig) -> None:
    """Check that a requested classifier has labels to train on.

    Raises:
        ConfigError: It has none.
    """
    if evaluate.features == "classifier" and load_dataset(data).num_classes is None:
        raise ConfigError(
            "evaluate.features must not be classifier where not all images have labels, got "
            f"classifier (data.source {data.source}). Give --evaluate.features auto: Inception's "
            "weights are looked for in --evaluate.inception-path, in the cache and on the "
            f"network. {UNSCORED_REMEDY}"
        )


def check_features(data: DataConfig, evaluate: EvaluateConfig) -> None:
    """Check the network that is named or in the cache, if features may be its.

    Inception is fetched into the cache where nothing else can measure: images without labels
    have no classifier. Where it cannot be, ``auto`` scores nothing, and a warning says so.

    Raises:
        EvaluationError: It is not there where it is named, or it is damaged or another one, or
            Inception is needed and not available.
    """
    if evaluate.features in ("clip", "dinov2"):
        check_folder(evaluate.features, evaluate)
    elif evaluate.features in ("auto", "inception"):
        named, cache = evaluate.inception_path, resolve_path(evaluate.cache_dir)
        if named is not None or exists(cache / INCEPTION_FILE):
            _inception_folder(named, cache)
            return
        needs_it = evaluate.features == "inception" or load_dataset(data).num_classes is None
        if needs_it and _available_features(data, evaluate, evaluate.features) is None:
            logger.warning(
                "no image will be scored: models are compared by their denoising loss on held-out "
                "images, and samples are drawn to be seen. %s",
                _missing(data),
            )


def find_features(data: DataConfig, evaluate: EvaluateConfig, wanted: str) -> FeatureSpec:
    """Find what images are scored on, where they must be.

    Args:
        data: The training images.
        evaluate: Where Inception and classifiers may be.
        wanted: ``auto``, or what is measured by.

    Raises:
        ConfigError: A classifier is asked for, and there are no labels.
        EvaluationError: Features are not available, or ``wanted`` is ``none``.
    """
    spec = _available_features(data, evaluate, wanted)
    if spec is None and wanted == "none":
        raise EvaluationError(
            "Images cannot be scored with evaluate.features none, where models are compared by "
            "their losses. Samples are scored by tdc-ray score IMAGES --reference RUN."
        )
    if spec is None:
        raise EvaluationError(_missing(data))
    return spec


def _missing(data: DataConfig) -> str:
    """Write why images without labels have no features, and what provides some."""
    by_folder = " Subfolders may be labels: --data.labels-from-folders."
    return (
        f"{INCEPTION_FILE} is not available and data.source {data.source} has no labels to train "
        f"a classifier on. {INCEPTION_REMEDY}{by_folder if data.source == 'folder' else ''}"
    )


def _available_features(
    data: DataConfig, evaluate: EvaluateConfig, wanted: str
) -> FeatureSpec | None:
    """Return the features that are wanted; None for ``none``, or where ``auto`` finds none."""
    if wanted == "none":
        return None
    check_labels(data, evaluate)
    dataset, cache = load_dataset(data), resolve_path(evaluate.cache_dir)
    is_drawn = data.source == BASE_SAMPLES  # a score against the base's own samples is no FID
    fingerprint, moments = dataset.fingerprint(), cache / "moments"
    if wanted in HUB_MODELS:
        kind: HubKind = "clip" if wanted == "clip" else "dinov2"
        network = hub_folder(kind, evaluate)
        extractor = hub_extractor_name(kind, network)
        key = f"{fingerprint}-{hashlib.sha256(extractor.encode()).hexdigest()[:16]}"
        paths = (moments / f"{key}.npz", moments / f"{key}.features.npz")
        metric = f"fd_{data.name}_{kind}" if is_drawn else f"fd_{kind}"
        return FeatureSpec(metric, extractor, network, *paths, kind)
    if wanted != "classifier":
        folder = _inception_folder(evaluate.inception_path, cache)
        if folder is not None:
            key = f"{fingerprint}-inception"
            paths = (moments / f"{key}.npz", moments / f"{key}.features.npz")
            extractor = "Inception-v3 (clean-fid, clean)"
            metric = f"fd_{data.name}_inception" if is_drawn else "fid"
            return FeatureSpec(metric, extractor, folder, *paths, "inception")
        if wanted == "inception":
            raise EvaluationError(
                f"evaluate.features is inception, but {INCEPTION_FILE} is neither in {cache} nor "
                f"on the network. {INCEPTION_REMEDY} {UNSCORED_REMEDY}"
            )
    if dataset.num_classes is None:
        return None
    key = hashlib.sha256(f"{fingerprint} {CLASSIFIER_VERSION}".encode()).hexdigest()[:16]
    return FeatureSpec(
        f"fd_{data.name}_cnn",
        f"CNN of this project, {NUM_FEATURES} features, trained on the labels ({key})",
        cache / "classifiers" / f"{key}.safetensors",
        moments / f"{key}-cnn.npz",
        moments / f"{key}-cnn.features.npz",
        "classifier",
        dataset.num_classes,
    )


def load_extractor(spec: FeatureSpec, num_channels: int, device: torch.device) -> Extractor:
    """Load the extractor that a spec names; a classifier must be trained already."""
    if spec.kind in ("clip", "dinov2"):
        return load_hub_extractor(spec.kind, spec.path, device)
    if spec.num_classes is None:
        folder = fetch(spec.path / INCEPTION_FILE).parent
        inception = InceptionV3W(str(folder), download=False).to(device).eval()
        return partial(_inception_features, inception, build_resizer("clean"), device)
    classifier = Classifier(num_channels, spec.num_classes)
    load_model(classifier, fetch(spec.path))
    return partial(_classifier_features, classifier.eval().to(device), device)


def ready_statistics(name: str, image_size: int) -> tuple[FloatArray, FloatArray] | None:
    """Download clean-fid's own statistics of a training split, or None where there are none."""
    try:
        with _timeout():
            mean, covariance = get_reference_statistics(
                name, image_size, mode="clean", split="train"
            )
    except (OSError, ValueError, BadZipFile) as error:
        logger.warning("clean-fid's statistics of %s are not available: %s", name, error)
        return None
    return np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)


class Classifier(nn.Module):
    """A small CNN whose last hidden layer outputs the features."""

    def __init__(self, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, NUM_FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``(B, num_classes)`` of ``(B, C, H, W)`` in [-1, 1]."""
        logits: Tensor = self.head(self.body(x))
        return logits


def classifier_macs(shape: tuple[int, int, int]) -> float:
    """Return the macs of the classifier's convolutions for an image ``(C, H, W)``."""
    channels, height, width = shape
    return 9.0 * 32 * (channels + 64) * height * width


def train_classifier(
    dataset: ImageDataset, num_channels: int, num_classes: int, path: Path
) -> float:
    """Train the classifier, save it, and return its accuracy on the training images.

    Everything is fixed but the data: the same images make the same classifier.
    """
    torch.manual_seed(0)
    classifier = Classifier(num_channels, num_classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.01)
    images = batches(dataset, batch_size=CLASSIFIER_BATCH, seed=0, num_steps=CLASSIFIER_STEPS)
    right = total = 0
    for step, (batch, labels) in enumerate(images):
        assert isinstance(labels, Tensor)
        logits = classifier(to_minus_one_one(batch))
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= CLASSIFIER_STEPS * 3 // 4:
            right += int((logits.argmax(1) == labels).sum())
            total += len(labels)
    with atomic_path(path) as temporary:
        save_model(classifier, str(temporary))
    return right / total


@torch.inference_mode()
def _classifier_features(
    classifier: Classifier, device: torch.device, images: Tensor
) -> FloatArray:
    features: Tensor = classifier.body(to_minus_one_one(images.to(device)))
    return features.double().cpu().numpy()


@torch.inference_mode()
def _inception_features(
    inception: nn.Module,
    resize: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    device: torch.device,
    images: Tensor,
) -> FloatArray:
    colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    resized = np.stack([resize(image) for image in colour])  # (B, 299, 299, 3), 0..255
    features: Tensor = inception(torch.from_numpy(resized).permute(0, 3, 1, 2).to(device))
    return features.double().cpu().numpy()


def _inception_folder(named: str | None, cache: Path) -> Path | None:
    """Find Inception's weights: in the folder that is named, in the cache, on the network."""
    if named is not None:
        if not exists(resolve_path(named) / INCEPTION_FILE):
            raise EvaluationError(
                f"evaluate.inception_path {named} must be a folder that holds {INCEPTION_FILE}."
            )
        _check_inception_file(resolve_path(named) / INCEPTION_FILE)
        return resolve_path(named)
    if not exists(cache / INCEPTION_FILE):
        _download_inception(cache)
        if not exists(cache / INCEPTION_FILE):
            return None
    _check_inception_file(cache / INCEPTION_FILE)
    return cache


@functools.cache
def _download_inception(cache: Path) -> None:
    """Download Inception's weights if they can be; a process tries once, for it may take long."""
    try:
        with _timeout(), tempfile.TemporaryDirectory() as folder:
            check_download_inception(folder)
            torch.jit.load(Path(folder) / INCEPTION_FILE)  # fails on an incomplete download
            with atomic_path(cache / INCEPTION_FILE) as temporary:
                shutil.copyfile(Path(folder) / INCEPTION_FILE, temporary)
    except (OSError, RuntimeError, StorageError) as error:
        logger.warning("%s cannot be downloaded: %s", INCEPTION_FILE, error)


def _check_inception_file(path: Path) -> None:
    """Check that TorchScript can load a file, as it cannot one that was cut short.

    Raises:
        EvaluationError: It cannot.
    """
    state = fetch(path).stat()
    if not _loads(path, state.st_size, state.st_mtime_ns):
        raise EvaluationError(
            f"{display_path(path)} is damaged or cut short: delete it and fetch it again."
        )


@functools.cache
def _loads(path: Path, _size: int, _mtime_ns: int) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is on its way out
        try:
            torch.jit.load(path, map_location="cpu")
        except RuntimeError:
            return False
    return True


@contextmanager
def _timeout() -> Iterator[None]:
    """Limit clean-fid's wait for a server, for which it sets no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

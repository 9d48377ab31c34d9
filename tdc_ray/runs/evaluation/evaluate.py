"""Scores the base and the experts: samples images, extracts features, computes distances.

All of it is work items, so that 50,000 images use the whole pool. Both models start from the same
noise, take the same steps and are compared with the same training images.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tdc_ray.config.data import BASE_SAMPLES, DataConfig
from tdc_ray.config.evaluate import EvaluateConfig, Metric
from tdc_ray.config.run import RunConfig
from tdc_ray.config.sampler import sampler_key
from tdc_ray.data.dataset import ArrayImages, ImageDataset
from tdc_ray.data.fingerprint import conditioning_key, diffusion_key, images_key
from tdc_ray.data.latents import training_data
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline, swapped_pipeline
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Inputs, Report, WorkItem
from tdc_ray.models.families import load_network
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.first_stage import first_stage_digest, input_shape
from tdc_ray.models.precision import DTYPES
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.runs.evaluation.features import (
    FeatureSpec,
    load_extractor,
    ready_statistics,
    train_classifier,
)
from tdc_ray.runs.evaluation.metrics import Moments, distance, drawn, moments_of, other_metrics
from tdc_ray.runs.pipelines import image_conditions, pipeline_index
from tdc_ray.storage.files import atomic_path, exists, fetch, remove
from tdc_ray.storage.run_dir import RunDir

Which = Literal["base", "tdc", "longer-base"]
"""The base, the experts, or the base trained on."""

VERSION = 1
"""Rises whenever images or features change, so that cached ones are made again."""

NUM_UNSCORED = 64
"""Most images of a model that are sampled to be seen, where none is scored."""

MAX_SHARDS = 64
"""Most shards that the images of one model are sampled in."""

NUM_REAL_IMAGES = 64
"""Training images that are shown beside samples."""

REFERENCE_SHARD = 10_000
"""Training images whose features one item extracts."""


@dataclass(frozen=True, slots=True)
class Score:
    """The distance of one model's images, and how fast they were sampled."""

    score: float
    images_per_second: float
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scores beside the Frechet distance, by their names."""

    num_features: int | None = None
    """Features of an image; None of held-out losses."""


@dataclass(frozen=True, slots=True)
class SampleResult:
    """The cost of sampling a shard; its images are in a file."""

    num_images: int
    seconds: float
    digest: str | None = None
    """SHA-256 of the images. None means a result of a version that computed none."""


@dataclass(frozen=True, slots=True)
class FeatureResult:
    """The images whose features were extracted; their moments are in a file."""

    num_images: int


@dataclass(frozen=True, slots=True)
class ClassifierResult:
    """Accuracy of the classifier on its training images."""

    accuracy: float


class Shard(NamedTuple):
    """A shard of one model's images, sampled and with features extracted."""

    sampled: SampleResult
    moments_path: Path
    features_path: Path | None


@dataclass(frozen=True, slots=True)
class SampleJob:
    """Sample the images ``first`` to ``first + count - 1`` of the evaluation."""

    run_dir: RunDir
    config: RunConfig
    which: Which
    first: int
    count: int
    swapped: TimestepGroup | None = None
    """The group whose expert takes the place of the base trained on."""

    @property
    def name(self) -> str:
        """Of the model: of its items, and of its folder of images."""
        return self.which if self.swapped is None else f"swap-{self.swapped.index:02d}"


@dataclass(frozen=True, slots=True)
class FeatureJob:
    """Extract features of sampled images (a path) or of training images (first and count)."""

    data: DataConfig
    evaluate: EvaluateConfig
    spec: FeatureSpec
    samples: Path | tuple[int, int]
    moments_path: Path
    digest: str | None = None
    """SHA-256 of sampled images, where it is known."""

    features_path: Path | None = None
    """Where features themselves go, of the images of the whole set that are drawn."""

    first: int = 0
    total: int = 0
    """Which of the whole set these images begin with, and how many it has."""


def prepare_features(
    run_dir: RunDir, data: DataConfig, config: EvaluateConfig, spec: FeatureSpec
) -> Chain[str]:
    """Train the classifier if one is needed, then compute the training images' features.

    Classifier, features and moments are kept in the cache for other runs.

    Returns:
        Where the reference comes from, in words.
    """
    if spec.num_classes is not None and not exists(spec.path):
        result_path = spec.path.with_suffix(".json")
        remove(result_path)  # a result without weights does not count
        item = WorkItem(
            key="features/classifier",
            function=train_classifier_item,
            job=FeatureJob(data, config, spec, spec.path, spec.path),
            result_path=result_path,
            cost=0.0,
            inputs=classifier_inputs,
            files=(spec.path,),
            result_type=ClassifierResult,
        )
        yield from result_of(item)
    if config.metrics and not exists(spec.features_path):
        job = FeatureJob(data, config, spec, (0, 0), spec.features_path)
        drawing = WorkItem(
            key="reference/features",
            function=extract_reference,
            job=job,
            result_path=spec.features_path.with_suffix(".json"),
            cost=0.0,
            inputs=reference_inputs,
            files=(spec.features_path,),
            result_type=FeatureResult,
        )
        remove(drawing.result_path)
        yield from result_of(drawing)
    if exists(run_dir.reference):
        with np.load(fetch(run_dir.reference), allow_pickle=False) as file:
            return str(file["source"])
    named = config.reference  # of clean-fid's own statistics, which are of Inception's
    if named is not None and spec.kind == "inception":
        moments = ready_statistics(named, data.height)
        if moments is not None:
            source = f"clean-fid's statistics of {named}, training split"
            return _save_reference(run_dir, moments, source)
    count = len(load_dataset(data))
    if not exists(spec.moments_path):
        shards = range(0, count, REFERENCE_SHARD)
        paths = [run_dir.samples / "reference" / f"{first:07d}.npz" for first in shards]
        yield [
            _feature_item(
                f"reference/{first:07d}",
                FeatureJob(data, config, spec, (first, min(REFERENCE_SHARD, count - first)), path),
            )
            for first, path in zip(shards, paths, strict=True)
        ]
        reduce(add, map(Moments.load, paths)).save(spec.moments_path)
    moments = Moments.load(spec.moments_path).mean_and_covariance()
    is_drawn = data.source == BASE_SAMPLES
    source = (
        f"{count} samples of the base, no data set" if is_drawn else f"the {count} training images"
    )
    return _save_reference(run_dir, moments, source)


def evaluate(
    run_dir: RunDir,
    config: RunConfig,
    spec: FeatureSpec,
    which: Which,
    macs: float,
    swapped: TimestepGroup | None = None,
) -> Mapping[str, Chain[Shard]]:
    """Return the scoring of one model: chains that sample a shard and extract its features.

    Args:
        run_dir: Where the model is and the images go.
        config: The run's settings.
        spec: The features.
        which: The base, the experts, or the base trained on.
        macs: Macs of one denoising step, for the order of the work.
        swapped: The group whose expert takes the place of the base trained on.
    """
    batch, total = config.evaluate.batch_size, config.evaluate.num_images
    size = batch * -(-total // (MAX_SHARDS * batch))
    jobs = [
        SampleJob(run_dir, config, which, first, min(size, total - first), swapped)
        for first in range(0, total, size)
    ]
    return {f"{job.name}/{job.first:07d}": _shard(job, spec, macs) for job in jobs}


def unscored_samples(
    run_dir: RunDir, config: RunConfig, which: Which, macs: float
) -> Chain[SampleResult]:
    """Sample some images of one model, to be seen; see :func:`evaluate`."""
    count = num_sampled(config.evaluate, None)
    return result_of(_sample_item(SampleJob(run_dir, config, which, 0, count), macs))


def num_sampled(config: EvaluateConfig, spec: FeatureSpec | None) -> int:
    """Return how many images of each model are sampled: those to be scored, or some to be seen."""
    return min(config.num_images, NUM_UNSCORED) if spec is None else config.num_images


def score(
    run_dir: RunDir,
    shards: Sequence[Shard],
    spec: FeatureSpec | None = None,
    metrics: Sequence[Metric] = (),
) -> Score:
    """Compute one model's scores, and how fast it samples.

    Args:
        run_dir: The run directory.
        shards: The model's images.
        spec: The features, for scores beside the Frechet distance.
        metrics: Which these are.
    """
    moments = reduce(add, (Moments.load(shard.moments_path) for shard in shards))
    with np.load(fetch(run_dir.reference), allow_pickle=False) as file:
        reference = (file["mean"], file["covariance"])
    seconds = sum(shard.sampled.seconds for shard in shards)
    return Score(
        distance(moments.mean_and_covariance(), reference),
        sum(shard.sampled.num_images for shard in shards) / seconds,
        seconds,
        {} if spec is None else _other_metrics(shards, spec, metrics),
        len(moments.total),
    )


def _other_metrics(
    shards: Sequence[Shard], spec: FeatureSpec, metrics: Sequence[Metric]
) -> dict[str, float]:
    paths = [shard.features_path for shard in shards if shard.features_path is not None]
    if len(paths) < len(shards):
        return {}
    features = np.concatenate([load_features(path) for path in paths])
    return named_metrics(features, spec, metrics)


def named_metrics(
    features: NDArray[np.float32], spec: FeatureSpec, metrics: Sequence[Metric]
) -> dict[str, float]:
    """Compute scores beside the Frechet distance, by their names; ``(N, D)`` features."""
    if not metrics:  # there is no file of the training images' features then
        return {}
    found = other_metrics(features, load_features(spec.features_path), metrics)
    return {spec.name_of(name): value for name, value in found.items()}


def load_features(path: Path) -> NDArray[np.float32]:
    """Load features, ``(N, D)``."""
    with np.load(fetch(path), allow_pickle=False) as file:
        features: NDArray[np.float32] = file["features"]
    return features


def load_pipeline(
    run_dir: RunDir, config: RunConfig, which: Which, swapped: TimestepGroup | None = None
) -> ProgressivePipeline:
    """Load a model of a run, in the precision of scoring."""
    if which == "tdc":
        pipeline = ProgressivePipeline.from_pretrained(run_dir.experts)
    else:
        unet, index = load_network(model_folder(run_dir, which)), pipeline_index(config)
        pipeline = base_pipeline(unet, index)
        if swapped is not None:
            expert = load_expert(run_dir.expert(swapped.index))
            pipeline = swapped_pipeline(unet, expert, (swapped.first, swapped.last), index)
    pipeline.experts.to(DTYPES[config.evaluate.precision])
    pipeline.compile_mode = config.sampler.compile
    return pipeline


def model_folder(run_dir: RunDir, which: Which) -> Path:
    """Return the folder of a model's weights."""
    folders: Mapping[Which, Path] = {
        "base": run_dir.base_unet,
        "tdc": run_dir.experts,
        "longer-base": run_dir.longer_base,
    }
    return folders[which]


def sample_images(job: SampleJob, report: Report) -> SampleResult:
    """Sample a shard of the images into an npz file (``arr_0``, uint8, ``(N, H, W, C)``)."""
    pipeline = load_pipeline(job.run_dir, job.config, job.which, job.swapped)
    pipeline = pipeline.to(worker_device())
    pipeline.set_progress_bar_config(disable=True)
    size, pixels = job.config.evaluate.batch_size, list[NDArray[np.uint8]]()

    def sampled(first: int, count: int) -> NDArray[np.uint8]:
        generators = image_generators(job.config.evaluate.seed, first, count)
        conditions = image_conditions(job.config, first, count)
        images: NDArray[np.uint8] = pipeline(
            count, generators, output_type="np", **conditions
        ).images
        return images

    if job.config.sampler.compile != "none":  # compiling every expert is no part of the rate
        sampled(job.first, min(size, job.count))
    started = time.perf_counter()
    for first in range(job.first, job.first + job.count, size):
        count = min(size, job.first + job.count - first)
        pixels.append(sampled(first, count))
        report({}, first + count - job.first)
    images = np.concatenate(pixels)
    with atomic_path(_samples_path(job)) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images)
    digest = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    return SampleResult(job.count, time.perf_counter() - started, digest)


def sample_inputs(job: SampleJob) -> Inputs:
    """Return the cache inputs of :func:`sample_images`."""
    config, run_dir = job.config, job.run_dir
    stage, precision = config.data.first_stage, config.evaluate.precision
    # Keys of fp32 are those from before there was a choice.
    other: Inputs = {} if precision == "fp32" else {"precision": precision}
    if (group := job.swapped) is not None:
        expert = weights_digest(run_dir.expert(group.index))
        other = {**other, "swapped": [expert, group.first, group.last]}
    if config.data.text_encoder is not None:
        training = training_data(config.data, config.evaluate.cache_dir)
        other = {**other, "prompts_of": images_key(training)}
    return {
        **other,
        "stage": "sample",
        "version": VERSION,
        "model": weights_digest(model_folder(run_dir, job.which)),
        "first_stage": None if stage is None else first_stage_digest(Path(stage)),
        "shape": input_shape(config.data),
        "diffusion": diffusion_key(config.diffusion),
        "conditioning": conditioning_key(config.conditioning),
        "sampler": sampler_key(config.sampler),
        "seed": config.evaluate.seed,
        "batch_size": config.evaluate.batch_size,
        "images": [job.first, job.count],
    }


def feature_inputs(job: FeatureJob) -> Inputs | None:
    """Return the cache inputs of :func:`extract_features`, where they are known."""
    if not isinstance(job.samples, Path):
        images = [
            images_key(training_data(job.data, job.evaluate.cache_dir)),
            *job.samples,
        ]
    elif job.digest is not None:
        images = [job.digest]
    else:
        return None
    kept: Inputs = {} if job.features_path is None else {"kept": [job.first, job.total]}
    return {
        **kept,
        "stage": "features",
        "version": VERSION,
        "extractor": job.spec.extractor,
        "images": images,
        "batch_size": job.evaluate.batch_size,
    }


def reference_inputs(job: FeatureJob) -> Inputs:
    """Return the cache inputs of :func:`extract_reference`."""
    return {
        "stage": "reference features",
        "version": VERSION,
        "extractor": job.spec.extractor,
        "images": images_key(training_data(job.data, job.evaluate.cache_dir)),
        "batch_size": job.evaluate.batch_size,
    }


def classifier_inputs(job: FeatureJob) -> Inputs:
    """Return the cache inputs of :func:`train_classifier_item`."""
    return {"stage": "classifier", "extractor": job.spec.extractor}


def extract_features(job: FeatureJob, report: Report) -> FeatureResult:
    """Extract features and write their moments."""
    dataset: ImageDataset
    if isinstance(job.samples, Path):
        with np.load(fetch(job.samples), allow_pickle=False) as file:
            images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)  # (N, C, H, W)
        dataset, first, count = ArrayImages(images, None), 0, len(images)
    else:
        dataset, (first, count) = load_dataset(job.data), job.samples
    indices = range(first, first + count)
    among = drawn(job.total) - job.first if job.features_path else np.arange(0)
    moments, features = features_of(dataset, indices, job.spec, job.evaluate.batch_size, among)
    if job.features_path is not None:
        _save_features(job.features_path, features)
    moments.save(job.moments_path)
    report({}, 1)
    return FeatureResult(count)


def extract_reference(job: FeatureJob, report: Report) -> FeatureResult:
    """Extract features of training images that are drawn."""
    dataset = load_dataset(job.data)
    indices = drawn(len(dataset)).tolist()
    whole = np.arange(len(indices))
    _, features = features_of(dataset, indices, job.spec, job.evaluate.batch_size, whole)
    _save_features(job.spec.features_path, features)
    report({}, 1)
    return FeatureResult(len(indices))


def _save_features(path: Path, features: NDArray[np.float32]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, features=features)


def features_of(
    dataset: ImageDataset,
    indices: Sequence[int],
    spec: FeatureSpec,
    batch_size: int,
    kept: NDArray[np.int64],
) -> tuple[Moments, NDArray[np.float32]]:
    """Compute features of some images of a dataset.

    Args:
        dataset: The images.
        indices: Which of them.
        spec: The features.
        batch_size: How many images at once.
        kept: Of which of these, counted from the first of the indices, features are returned;
            numbers beyond them count for nothing.

    Returns:
        The moments of all, and the kept ones' features, ``(K, D)``.
    """
    num_channels = dataset.__getitems__(indices[:1]).images.shape[1]
    extractor = load_extractor(spec, num_channels, worker_device())
    total, parts = None, []
    # Moments of 2,048 features take 34 MB: they are added up one batch at a time.
    for start in range(0, len(indices), batch_size):
        features = extractor(dataset.__getitems__(indices[start : start + batch_size]).images)
        moments = moments_of(features)
        total = moments if total is None else total + moments
        inside = kept[(kept >= start) & (kept < start + len(features))] - start
        parts.append(features[inside].astype(np.float32))
    assert total is not None
    return total, np.concatenate(parts)


def save_real_images(path: Path, data: DataConfig) -> None:
    """Write some training images as samples are written, drawn at random from all."""
    dataset = load_dataset(data)
    chosen = np.random.default_rng(0).permutation(len(dataset))[:NUM_REAL_IMAGES]
    images = dataset.__getitems__(chosen.tolist()).images.permute(0, 2, 3, 1)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images.numpy())


def train_classifier_item(job: FeatureJob, report: Report) -> ClassifierResult:
    """Train the classifier that the spec names."""
    assert job.spec.num_classes is not None
    dataset, channels = load_dataset(job.data), job.data.num_channels
    accuracy = train_classifier(dataset, channels, job.spec.num_classes, job.spec.path)
    report({"accuracy": accuracy}, 1)
    return ClassifierResult(accuracy)


def _sample_item(job: SampleJob, macs: float) -> WorkItem[SampleJob, SampleResult]:
    path = _samples_path(job)
    return WorkItem(
        key=f"evaluate-{job.name}/{job.first:07d}",
        function=sample_images,
        job=job,
        result_path=path.with_suffix(".json"),
        cost=macs * job.config.sampler.num_inference_steps * job.count,
        num_steps=job.count,
        inputs=sample_inputs,
        files=(path,),
        result_type=SampleResult,
    )


def _shard(job: SampleJob, spec: FeatureSpec, macs: float) -> Chain[Shard]:
    item, path = _sample_item(job, macs), _samples_path(job)
    sampled = yield from result_of(item)
    moments_path, config = path.with_suffix(".moments.npz"), job.config
    features_path = path.with_suffix(".features.npz") if config.evaluate.metrics else None
    features = FeatureJob(
        config.data,
        config.evaluate,
        spec,
        path,
        moments_path,
        sampled.digest,
        features_path,
        job.first,
        config.evaluate.num_images,
    )
    yield from result_of(_feature_item(f"{item.key}-features", features))
    return Shard(sampled, moments_path, features_path)


def _feature_item(key: str, job: FeatureJob) -> WorkItem[FeatureJob, FeatureResult]:
    return WorkItem(
        key=key,
        function=extract_features,
        job=job,
        # A result of moments alone, as of an older version, does not count for both.
        result_path=(job.features_path or job.moments_path).with_suffix(".json"),
        cost=0.0,
        inputs=feature_inputs,
        files=(job.moments_path, *([job.features_path] if job.features_path else [])),
        result_type=FeatureResult,
    )


def _save_reference(run_dir: RunDir, moments: tuple[FloatArray, FloatArray], source: str) -> str:
    mean, covariance = moments
    with atomic_path(run_dir.reference) as temporary, temporary.open("wb") as file:
        np.savez(file, mean=mean, covariance=covariance, source=source)
    return source


def _samples_path(job: SampleJob) -> Path:
    return job.run_dir.samples / job.name / f"{job.first:07d}.npz"

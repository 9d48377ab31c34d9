"""Scores the base and the experts: samples images, extracts features, Frechet distance.

Everything is cut into work items, so that 50,000 images use the whole pool. Both models start from
the same noise, take the same steps and are held against the same training images.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tdc_ray.config.run import RunConfig
from tdc_ray.data.fingerprint import images_key
from tdc_ray.data.latents import training_data
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline
from tdc_ray.diffusion.sampling import image_generators, image_labels
from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.execution.chain import Chain
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import AnyItem, Inputs, Report, Result, WorkItem
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.first_stage import first_stage_digest, input_shape
from tdc_ray.models.precision import DTYPES
from tdc_ray.models.unet2d.unet import load_unet
from tdc_ray.runs.evaluation.features import (
    FeatureSpec,
    load_extractor,
    ready_statistics,
    train_classifier,
)
from tdc_ray.runs.evaluation.metrics import Moments, distance, moments_of
from tdc_ray.storage.files import atomic_path, exists, fetch, remove
from tdc_ray.storage.run_dir import RunDir

Which = Literal["base", "tdc"]

VERSION = 1
"""Changes whenever images or features do, so that stored ones are made again."""

MAX_SHARDS = 64
"""Most pieces that the images of one model are sampled in."""

REFERENCE_SHARD = 10_000
"""Training images whose features one item extracts."""


@dataclass(frozen=True, slots=True)
class Score:
    """How one model did."""

    score: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SampleJob:
    """Sample the images ``first`` to ``first + count - 1`` of the evaluation."""

    run_dir: RunDir
    config: RunConfig
    which: Which
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class FeatureJob:
    """Extract features of sampled images (a path) or of training images (first and count)."""

    config: RunConfig
    spec: FeatureSpec
    samples: Path | tuple[int, int]
    moments_path: Path
    digest: str | None = None
    """Names the content of sampled images; None: it is not known."""


def prepare_features(run_dir: RunDir, config: RunConfig, spec: FeatureSpec) -> Chain[str]:
    """Train the classifier if one is needed, then take the moments of the training images.

    Both are kept in the cache for other runs.

    Returns:
        Where the reference comes from, in words.
    """
    if spec.num_classes is not None and not exists(spec.path):
        item = _classifier_item(config, spec)
        remove(item.result_path)  # without its weights it is no result
        yield [item]
    if exists(run_dir.reference):
        with np.load(fetch(run_dir.reference), allow_pickle=False) as file:
            return str(file["source"])
    ready = _ready(config, spec)
    if ready is not None:
        source = f"clean-fid's statistics of {config.evaluate.reference}, training split"
        return _keep_reference(run_dir, ready, source)
    count = len(load_dataset(config.data))
    if not exists(spec.moments_path):
        shards = range(0, count, REFERENCE_SHARD)
        paths = [run_dir.samples / "reference" / f"{first:07d}.npz" for first in shards]
        yield [
            WorkItem(
                key=f"reference/{first:07d}",
                function=extract_features,
                job=FeatureJob(config, spec, (first, min(REFERENCE_SHARD, count - first)), path),
                result_path=path.with_suffix(".json"),
                cost=0.0,
                inputs=feature_inputs,
                files=(path,),
            )
            for first, path in zip(shards, paths, strict=True)
        ]
        reduce(add, map(Moments.load, paths)).save(spec.moments_path)
    moments = Moments.load(spec.moments_path).mean_and_covariance()
    return _keep_reference(run_dir, moments, f"the {count} training images")


def evaluate(
    run_dir: RunDir, config: RunConfig, spec: FeatureSpec, which: Which, macs: float
) -> Mapping[str, Chain[Result]]:
    """Cut the scoring of one model into chains that sample a share and extract its features.

    Args:
        run_dir: Where the model is and the images go.
        config: The run's settings.
        spec: The features.
        which: The base or the experts.
        macs: Macs of one denoising step, for the order of the work.
    """
    size, total = config.evaluate.batch_size, config.evaluate.num_images
    share = size * -(-total // (MAX_SHARDS * size))
    return {
        f"{which}/{first:07d}": _shard(
            SampleJob(run_dir, config, which, first, min(share, total - first)), spec, macs
        )
        for first in range(0, total, share)
    }


def score(run_dir: RunDir, results: list[Result]) -> Score:
    """Put what one model's chains gave together: its Frechet distance, and how fast it samples."""
    moments = reduce(add, (Moments.load(Path(result["moments_path"])) for result in results))
    with np.load(fetch(run_dir.reference), allow_pickle=False) as file:
        reference = (file["mean"], file["covariance"])
    seconds = sum(result["seconds"] for result in results)
    return Score(
        distance(moments.mean_and_covariance(), reference),
        sum(result["num_images"] for result in results) / seconds,
        seconds,
    )


def load_pipeline(run_dir: RunDir, config: RunConfig, which: Which) -> ProgressivePipeline:
    """Load the base or the experts of a run, in the precision that they are scored in."""
    if which == "tdc":
        pipeline = ProgressivePipeline.from_pretrained(run_dir.experts)
    else:
        pipeline = base_pipeline(load_unet(run_dir.base_unet), config)
    pipeline.experts.to(DTYPES[config.evaluate.precision])
    return pipeline


def sample_images(job: SampleJob, report: Report) -> Result:
    """Sample a share of the images into an npz file (``arr_0``, uint8, ``(N, H, W, C)``)."""
    pipeline = load_pipeline(job.run_dir, job.config, job.which).to(worker_device())
    pipeline.set_progress_bar_config(disable=True)
    size, started = job.config.evaluate.batch_size, time.perf_counter()
    pixels = []
    for first in range(job.first, job.first + job.count, size):
        count = min(size, job.first + job.count - first)
        generators = image_generators(job.config.evaluate.seed, first, count)
        labels = image_labels(job.config.conditioning.num_classes, first, count)
        output = pipeline(count, generators, output_type="np", class_labels=labels)
        pixels.append(output.images)
        report({}, first + count - job.first)
    images = np.concatenate(pixels)
    with atomic_path(_samples_path(job)) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images)
    return {
        "num_images": job.count,
        "seconds": time.perf_counter() - started,
        "digest": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
    }


def sample_inputs(job: SampleJob) -> Inputs:
    """Give what :func:`sample_images` follows from."""
    config, run_dir = job.config, job.run_dir
    stage, precision = config.data.first_stage, config.evaluate.precision
    # Keys of fp32 are those from before there was a choice.
    low = {} if precision == "fp32" else {"precision": precision}
    return low | {
        "stage": "sample",
        "version": VERSION,
        "model": weights_digest(run_dir.experts if job.which == "tdc" else run_dir.base_unet),
        "first_stage": None if stage is None else first_stage_digest(Path(stage)),
        "shape": input_shape(config.data),
        "diffusion": asdict(config.diffusion),
        "conditioning": asdict(config.conditioning),
        "sampler": asdict(config.sampler),
        "seed": config.evaluate.seed,
        "batch_size": config.evaluate.batch_size,
        "images": [job.first, job.count],
    }


def feature_inputs(job: FeatureJob) -> Inputs | None:
    """Give what :func:`extract_features` follows from, where that is known."""
    if not isinstance(job.samples, Path):
        images = [
            images_key(training_data(job.config.data, job.config.evaluate.cache_dir)),
            *job.samples,
        ]
    elif job.digest is not None:
        images = [job.digest]
    else:
        return None
    return {
        "stage": "features",
        "version": VERSION,
        "extractor": job.spec.extractor,
        "images": images,
        "batch_size": job.config.evaluate.batch_size,
    }


def classifier_inputs(job: FeatureJob) -> Inputs:
    """Give what :func:`train_classifier_item` follows from."""
    return {"stage": "classifier", "extractor": job.spec.extractor}


def extract_features(job: FeatureJob, report: Report) -> Result:
    """Extract features and keep their moments."""
    extractor = load_extractor(job.spec, job.config.data.num_channels, worker_device())
    if isinstance(job.samples, Path):
        with np.load(fetch(job.samples), allow_pickle=False) as file:
            images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)  # (N, C, H, W)
        numbers = range(len(images))
    else:
        first, count = job.samples
        numbers = range(first, first + count)

    def moments(start: int) -> Moments:
        chosen = list(numbers[start : start + size])
        batch = (
            images[chosen]
            if isinstance(job.samples, Path)
            else load_dataset(job.config.data).__getitems__(chosen)[0]
        )
        return moments_of(extractor(batch))

    size = job.config.evaluate.batch_size  # moments of 2,048 features take 34 MB: none are kept
    reduce(add, map(moments, range(0, len(numbers), size))).save(job.moments_path)
    report({}, 1)
    return {"num_images": len(numbers)}


def train_classifier_item(job: FeatureJob, report: Report) -> Result:
    """Train the classifier that the spec names."""
    assert job.spec.num_classes is not None
    dataset, channels = load_dataset(job.config.data), job.config.data.num_channels
    accuracy = train_classifier(dataset, channels, job.spec.num_classes, job.spec.path)
    report({"accuracy": accuracy}, 1)
    return {"accuracy": accuracy}


def _shard(job: SampleJob, spec: FeatureSpec, macs: float) -> Chain[Result]:
    path = _samples_path(job)
    steps = job.config.sampler.num_inference_steps
    (sampled,) = yield [
        WorkItem(
            key=f"evaluate-{job.which}/{job.first:07d}",
            function=sample_images,
            job=job,
            result_path=path.with_suffix(".json"),
            cost=macs * steps * job.count,
            num_steps=job.count,
            inputs=sample_inputs,
            files=(path,),
        )
    ]
    moments_path = path.with_suffix(".moments.npz")
    yield [
        WorkItem(
            key=f"evaluate-{job.which}/{job.first:07d}-features",
            function=extract_features,
            job=FeatureJob(job.config, spec, path, moments_path, sampled.get("digest")),
            result_path=moments_path.with_suffix(".json"),
            cost=0.0,
            inputs=feature_inputs,
            files=(moments_path,),
        )
    ]
    return {**sampled, "moments_path": str(moments_path)}


def _classifier_item(config: RunConfig, spec: FeatureSpec) -> AnyItem:
    return WorkItem(
        key="features/classifier",
        function=train_classifier_item,
        job=FeatureJob(config, spec, spec.path, spec.path),
        result_path=spec.path.with_suffix(".json"),
        cost=0.0,
        inputs=classifier_inputs,
        files=(spec.path,),
    )


def _keep_reference(run_dir: RunDir, moments: tuple[FloatArray, FloatArray], source: str) -> str:
    mean, covariance = moments
    with atomic_path(run_dir.reference) as temporary, temporary.open("wb") as file:
        np.savez(file, mean=mean, covariance=covariance, source=source)
    return source


def _ready(config: RunConfig, spec: FeatureSpec) -> tuple[FloatArray, FloatArray] | None:
    """Give clean-fid's own statistics where they are asked for, fit the features and exist."""
    if config.evaluate.reference is None or spec.num_classes is not None:
        return None
    return ready_statistics(config.evaluate.reference, config.data.image_size)


def _samples_path(job: SampleJob) -> Path:
    return job.run_dir.samples / job.which / f"{job.first:07d}.npz"

"""The base's own samples in place of a data set: ``--data base``.

They are drawn by the run's sampler, guidance and classes, or prompts, from noise that no score is
taken from, into a folder of the cache that is named by all they follow from. Image ``i`` depends
on no other, so that an interrupted drawing resumes with the shards that are there.
"""

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tdc_ray.config.data import BASE_SAMPLES
from tdc_ray.config.run import RunConfig
from tdc_ray.config.sampler import sampler_key
from tdc_ray.data.fingerprint import diffusion_key
from tdc_ray.data.prompts import prompt_encodings, read_prompts
from tdc_ray.data.sources.base import BASE_SHARD, SAMPLES_FILE
from tdc_ray.data.tensor_shards import missing_shards, shard_path
from tdc_ray.diffusion.pipeline import base_pipeline
from tdc_ray.diffusion.samplers import checked_timesteps
from tdc_ray.diffusion.sampling import image_generators, image_labels, to_uint8
from tdc_ray.errors import ConfigError, DataError
from tdc_ray.execution.chain import Chain, results_of
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Inputs, Report, WorkItem
from tdc_ray.models.families import load_config, load_network
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.first_stage import first_stage_digest, input_shape, load_first_stage
from tdc_ray.models.precision import DTYPES
from tdc_ray.models.structure import reads_text
from tdc_ray.models.text_encoder import check_text_encoder, text_encoder_digest
from tdc_ray.runs.pipelines import image_conditions, pipeline_index
from tdc_ray.runs.pretrained.sources import PretrainedBase
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.digest import file_digest, json_digest
from tdc_ray.storage.files import atomic_path, exists, fetch, read_json, remove, write_json
from tdc_ray.storage.object_store import display_path, resolve_path

VERSION = 1
"""Changes whenever the images do, so that cached ones are drawn again."""

FOLDER = "base_samples"
"""Folder of the cache that the samples of all bases are in."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrawJob:
    """Draw the images ``first`` to ``first + count - 1`` of a base into a shard."""

    unet: Path
    config: RunConfig
    first: int
    count: int
    path: Path


@dataclass(frozen=True, slots=True)
class DrawResult:
    """How many images a shard holds, and how long it took to draw them."""

    num_images: int
    seconds: float


def with_base_samples(config: RunConfig, base: PretrainedBase | Path | None) -> RunConfig:
    """Return settings that name the folder of the base's samples, drawn or not.

    Settings of another source stay as they are.

    Args:
        config: The settings.
        base: The base, or the folder of its UNet. None means that the run trains one.

    Raises:
        ConfigError: There is no base to draw from, or a path of other images is named.
        CheckpointError: The first stage is missing or malformed.
    """
    data = config.data
    if data.source != BASE_SAMPLES:
        return config
    if base is None:
        raise ConfigError(
            "data.source base draws images from a base that is given, and none is: name it by "
            "--base, or name images by --data."
        )
    if data.path is not None and Path(data.path).parent.name != FOLDER:
        raise ConfigError(
            f"data.path must be left out with data.source base, got {data.path}: no images are "
            "needed."
        )
    count, stage = _num_images(config), data.first_stage
    drawn = {
        "num_images": count,
        "num_classes": config.conditioning.num_classes,
        "shape": data.shape,
    }
    document = {
        "version": VERSION,
        "drawn": drawn,
        "model": _digest(config, base),
        "first_stage": None if stage is None else first_stage_digest(Path(stage)),
        "latents": input_shape(data),
        "diffusion": diffusion_key(config.diffusion),
        "sampler": sampler_key(config.sampler),
        "seed": config.seed,
        "precision": config.evaluate.precision,
        "batch_size": _batch_size(config),
    }
    if _reads_text(base):
        prompts = read_prompts(data.prompts)
        drawn["num_prompts"] = len(prompts)
        encoder = text_encoder_digest(check_text_encoder(data.text_encoder))
        document |= {"prompts": prompts, "text_encoder": encoder}
    elif data.prompts is not None:
        raise ConfigError(
            f"data.prompts goes with a base that is conditioned on text, got {data.prompts} with "
            "one that is not. Leave it out."
        )
    cache = resolve_path(config.evaluate.cache_dir)
    folder = cache / FOLDER / json_digest(document)[:16]
    if not exists(folder / SAMPLES_FILE):
        write_json(folder / SAMPLES_FILE, document)
    data = replace(data, path=display_path(folder), num_images=count)
    return replace(config, data=data)


def _reads_text(base: PretrainedBase | Path) -> bool:
    folder = base if isinstance(base, Path) else base.folder
    return folder is not None and reads_text(load_config(folder))


def _num_images(config: RunConfig) -> int:
    """Return how many images are drawn.

    By default search and refit of a group get an image for each noised one.
    """
    if config.data.num_images is not None:
        return config.data.num_images
    prune = config.prune
    most = max(prune.num_images, prune.num_refit_images)
    return math.ceil(most / (1 - prune.held_out_share))


def draw_base_samples(config: RunConfig, unet: Path) -> Chain[None]:
    """Draw the images that are missing, if the base's samples are asked for, shard by shard.

    Args:
        config: The settings, with the folder of the samples.
        unet: The folder of the base's UNet, as workers see it.
    """
    if config.data.source != BASE_SAMPLES:
        return
    path, count, items = config.data.path, config.data.num_images, []
    assert path is not None and count is not None  # noqa: PT018  # with_base_samples
    folder, passes = resolve_path(path), _num_passes(config)
    prompts = _samples(config).get("prompts")
    if prompts is not None:
        key, negative = "base_samples/prompts", config.sampler.negative_prompt
        if missing := prompt_encodings(key, prompts, config.data, folder, negative):
            yield from results_of(missing)
    for first in missing_shards(folder, count, BASE_SHARD):
        shard = shard_path(folder, first)
        result_path = shard.with_suffix(".json")
        remove(result_path)  # without its shard it is no result
        job = DrawJob(unet, config, first, min(BASE_SHARD, count - first), shard)
        items.append(
            WorkItem(
                key=f"base_samples/{first:09d}",
                function=draw_images,
                job=job,
                result_path=result_path,
                cost=float(job.count * passes),
                num_steps=job.count,
                inputs=shard_inputs,
                files=(shard,),
                result_type=DrawResult,
            )
        )
    there = count - sum(item.num_steps for item in items)
    logger.info(
        "no data set: %d images are drawn from the base by %s (%d passes each), %d of them are "
        "there; %s",
        count,
        config.sampler.name,
        passes,
        there,
        display_path(folder),
    )
    if items:
        yield from results_of(items)


@torch.inference_mode()
def draw_images(job: DrawJob, report: Report) -> DrawResult:
    """Draw some images into a shard, which appears when it is whole; latents stay beside them.

    Raises:
        DataError: A sample is not finite.
    """
    config, started, device = job.config, time.perf_counter(), worker_device()
    index = pipeline_index(config).model_copy(update={"first_stage": None})  # latents are wanted
    pipeline = base_pipeline(load_network(job.unet), index)
    pipeline.experts.to(DTYPES[config.evaluate.precision])
    pipeline.compile_mode = config.sampler.compile
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    stage = config.data.first_stage
    first_stage = None if stage is None else load_first_stage(Path(stage)).to(device)
    seed, size = derive_seed(config.seed, "base samples"), _batch_size(config)
    prompts, kinds = _samples(config).get("prompts"), config.conditioning.num_classes
    kinds = kinds if prompts is None else len(prompts)
    parts: dict[str, list[torch.Tensor]] = {"images": [], "labels": [], "latents": []}
    for start in range(job.first, job.first + job.count, size):
        count = min(size, job.first + job.count - start)
        generators = image_generators(seed, start, count)
        conditions = image_conditions(config, start, count)
        samples = pipeline(count, generators, output_type="pt", **conditions).images
        images = samples
        if first_stage is not None:
            parts["latents"].append(samples.cpu())
            images = first_stage.decode(samples)
        if not (samples.isfinite().all() and images.isfinite().all()):
            raise DataError(
                f"the base draws images that are not finite by {config.sampler.name}: set another "
                "--sampler.scheduler, or name images by --data."
            )
        parts["images"].append(to_uint8(images).permute(0, 3, 1, 2))
        labels = image_labels(kinds, start, count)
        parts["labels"].append(torch.full((count,), -1) if labels is None else labels)
        report({}, start + count - job.first)
    tensors = {name: torch.cat(some).contiguous() for name, some in parts.items() if some}
    with atomic_path(job.path) as temporary:
        save_file(tensors, temporary)
    return DrawResult(job.count, time.perf_counter() - started)


def shard_inputs(job: DrawJob) -> Inputs:
    """Return what :func:`draw_images` follows from; the folder's name holds most of it."""
    return {"stage": "base samples", "of": job.path.parent.name, "images": [job.first, job.count]}


def drawing_macs(config: RunConfig, macs_base: int) -> float:
    """Return the macs of drawing all images, whether they were in the cache or not.

    A first stage that decodes them is not counted, as elsewhere.
    """
    count = config.data.num_images  # None with other sources
    return 0.0 if count is None else float(count * _num_passes(config) * macs_base)


def _num_passes(config: RunConfig) -> int:
    """Return the forward passes of the base for an image."""
    guided = config.sampler.guidance_scale != 1 and (
        config.conditioning.num_classes is not None or "prompts" in _samples(config)
    )
    return len(checked_timesteps(config.diffusion, config.sampler)) * (2 if guided else 1)


def _samples(config: RunConfig) -> dict[str, Any]:
    """Return what a folder of samples says of itself."""
    assert config.data.path is not None  # with_base_samples
    document: dict[str, Any] = read_json(resolve_path(config.data.path) / SAMPLES_FILE)
    return document


def _batch_size(config: RunConfig) -> int:
    return min(BASE_SHARD, config.evaluate.batch_size)


def _digest(config: RunConfig, base: PretrainedBase | Path) -> str:
    """Return a digest of the network and its weights, wherever they lie."""
    folder = base if isinstance(base, Path) else base.folder
    if folder is not None:
        return weights_digest(folder)
    assert isinstance(base, PretrainedBase)
    files = [file_digest(fetch(path)) for path in base.files]
    return json_digest([files, dict(config.model.attentions), config.model.architecture])

"""A dataset's latents, and what networks read of its captions: computed once, kept in the cache.

They lie in shards of safetensors, which are read bit by bit. Beside the captions of a dataset
without a first stage its images themselves lie there.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tdc_ray.config.data import BASE_SAMPLES, DataConfig
from tdc_ray.data.batches import to_minus_one_one
from tdc_ray.data.dataset import ImageBatch, ImageDataset
from tdc_ray.data.load import images_fingerprint, load_dataset
from tdc_ray.data.prompts import STATES_FILE, empty_prompt, load_states, prompt_encodings
from tdc_ray.data.sources.base import BaseSamples
from tdc_ray.data.sources.encoded import Names
from tdc_ray.data.tensor_shards import (
    CLASSES,
    missing_shards,
    named,
    read_rows,
    shard_path,
    write_tensors,
)
from tdc_ray.errors import DataError
from tdc_ray.execution.chain import Chain, results_of
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import AnyItem, Inputs, Report, WorkItem
from tdc_ray.models.first_stage import BATCH, first_stage_digest, input_shape, load_first_stage
from tdc_ray.models.labels import CaptionDropout
from tdc_ray.models.text_encoder import (
    PromptStates,
    check_text_encoder,
    prompt_parts,
    text_encoder_digest,
)
from tdc_ray.storage.digest import json_digest
from tdc_ray.storage.files import atomic_path, exists, fetch, remove
from tdc_ray.storage.object_store import display_path, resolve_path

VERSION = 1
"""Changes whenever what is in a shard does, so that cached ones are made again."""

MOST_PROMPTS = 1024
"""Captions that images are drawn for where captioned ones are learnt, evenly spread."""

LATENTS, IMAGES = "latents", "images"
"""Names of what is learnt in a shard: latents, or images where there is no first stage."""

CAPTIONS = "captions"
"""Name of what stands in a shard for its images' captions."""

SHARD = 1024
"""Images whose latents are in one file: 50 MB of FFHQ's."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a denoiser is trained on: images, or their latents."""

    data: DataConfig

    latents: Path | None = None
    """Folder of the shards of latents, or of captioned images; None means the images themselves,
    as they are."""

    @property
    def is_captioned(self) -> bool:
        """Whether the states of captions lie beside the latents, or the images."""
        return self.data.text_encoder is not None and self.data.source != BASE_SAMPLES

    def open(self) -> ImageDataset:
        """Open the images, or the shards that :func:`prepare_latents` computed.

        Raises:
            DataError: The data is missing or malformed, or shards were not computed yet.
        """
        if self.latents is None:
            return load_dataset(self.data)
        return _open_latents(self.data, self.latents)

    def prompts(self, negative_prompt: str | None = None) -> PromptStates | None:
        """Return the states of the prompts that images are drawn for; None if for none.

        Args:
            negative_prompt: What guidance leads away from; None means the default.
        """
        folder = self._states_folder()
        return None if folder is None else load_states(folder, negative_prompt)

    def caption_dropout(self, share: float) -> CaptionDropout | None:
        """Return the dropout of captions that networks are trained with; None without."""
        if not share:
            return None
        folder = self._states_folder()
        assert folder is not None  # runs.preflight.check_prompts
        return CaptionDropout(share, empty_prompt(folder))

    def _states_folder(self) -> Path | None:
        folder = self.latents
        if folder is None and self.data.source == BASE_SAMPLES and self.data.path is not None:
            folder = resolve_path(self.data.path)
        return None if folder is None or not exists(folder / STATES_FILE) else folder


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Encode the images ``first`` to ``first + count - 1`` of a dataset into a shard."""

    data: DataConfig
    first: int
    count: int
    path: Path


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """How many images' latents a shard holds."""

    num_images: int


class LatentImages:
    """Latents, or images, and labels, in shards of which only what is asked for is read."""

    def __init__(self, folder: Path, dataset: ImageDataset, learnt: str, labels: str) -> None:
        """Wrap the folder of the shards, the dataset, and the names of what is in a shard."""
        self.num_classes = dataset.num_classes
        self._folder, self._length = folder, len(dataset)
        self._learnt, self._labels = learnt, labels

    def __len__(self) -> int:
        return self._length

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        """Fetch latents, float32 ``(B, c, h, w)``, or images, and labels ``(B,)``, or captions."""
        return read_rows(self._folder, self._learnt, indices, SHARD, self._labels)

    def fingerprint(self) -> str:
        """Return a name for the content, by first stage and images."""
        return self._folder.name


def training_data(data: DataConfig, cache_dir: str) -> TrainingData:
    """Return what denoisers of some data are trained on.

    Latents are in a folder of the cache that is named by first stage, images and their shape, and
    so are captioned images, with the text encoder's name.

    Raises:
        DataError: There is a first stage, and the images are missing or malformed.
        CheckpointError: The first stage is missing or malformed.
    """
    if data.first_stage is None and not TrainingData(data).is_captioned:
        return TrainingData(data)
    if data.source == BASE_SAMPLES:
        assert data.path is not None  # the base was drawn from: its latents lie with the images
        return TrainingData(data, resolve_path(data.path))
    stage, shape = data.first_stage, input_shape(data)
    digest = None if stage is None else first_stage_digest(Path(stage))
    document = [VERSION, SHARD, digest, images_fingerprint(data), data.image_size, shape]
    if data.text_encoder is not None:
        document.append(text_encoder_digest(resolve_path(data.text_encoder)))
    key = json_digest(document)[:16]
    return TrainingData(data, resolve_path(cache_dir) / "latents" / key)


def prepare_latents(training: TrainingData, negative_prompt: str | None = None) -> Chain[None]:
    """Compute the latents, or states of captions, that are missing, shard by shard.

    Args:
        training: The images.
        negative_prompt: What guidance leads away from, where images are drawn for captions; None
            means the default.
    """
    data, folder = training.data, training.latents
    if folder is None or data.source == BASE_SAMPLES:
        return
    count, items = len(load_dataset(data)), list[AnyItem]()
    for first in missing_shards(folder, count, SHARD):
        path = shard_path(folder, first)
        result_path = path.with_suffix(".json")
        remove(result_path)  # without its shard it is no result
        job = EncodeJob(data, first, min(SHARD, count - first), path)
        items.append(
            WorkItem(
                key=f"latents/{first:09d}",
                function=encode_images,
                job=job,
                result_path=result_path,
                cost=float(job.count),
                num_steps=job.count,
                inputs=shard_inputs,
                files=(path,),
                result_type=EncodeResult,
            )
        )
    if items:
        what = LATENTS if data.first_stage is not None else CAPTIONS
        logger.info("%s of %d images go to %s", what, sum(i.num_steps for i in items), folder)
    if training.is_captioned:
        captions = captions_of(data)
        most = min(count, MOST_PROMPTS)
        drawn = [captions[number * count // most] for number in range(most)]
        items += prompt_encodings("latents/prompts", drawn, data, folder, negative_prompt)
    if items:
        yield from results_of(items)


def encode_images(job: EncodeJob, report: Report) -> EncodeResult:
    """Encode a share of the images, and their captions, into a shard, which appears when whole.

    Raises:
        DataError: A latent is not finite.
    """
    device, dataset, stage = worker_device(), load_dataset(job.data), job.data.first_stage
    first_stage = None if stage is None else load_first_stage(Path(stage)).to(device)
    learnt, labels = [], []
    for start in range(0, job.count, BATCH):
        numbers = range(job.first + start, job.first + min(start + BATCH, job.count))
        images, classes = dataset.__getitems__(numbers)
        assert isinstance(classes, torch.Tensor)  # numbers of captions, too
        if first_stage is not None:
            images = first_stage.encode(to_minus_one_one(images.to(device))).cpu()
        learnt.append(images)
        labels.append(classes)
        if not images.isfinite().all():
            raise DataError(
                f"data.first_stage {stage} encodes to latents that are not finite "
                f"for images {numbers.start} to {numbers.stop - 1}."
            )
        report({}, start + len(numbers))
    name = IMAGES if stage is None else LATENTS
    tensors = {name: torch.cat(learnt).contiguous(), CLASSES: torch.cat(labels)}
    with atomic_path(job.path) as temporary:
        if TrainingData(job.data).is_captioned:
            captions = captions_of(job.data)
            texts = [captions[number] for number in tensors[CLASSES].tolist()]
            pipeline = check_text_encoder(job.data.text_encoder)
            size = (job.data.height, job.data.width)
            parts = prompt_parts(pipeline, texts, size, device)
            next(parts)  # what guidance leads away from
            rows = (named(CAPTIONS, part) for part in parts)
            write_tensors(temporary, tensors, job.count, rows)
        else:
            save_file(tensors, temporary)
    return EncodeResult(job.count)


def captions_of(data: DataConfig) -> Names:
    """Return the captions of a dataset's images.

    Raises:
        DataError: It is of a source whose captions are not read.
    """
    captions: Names | None = getattr(load_dataset(data), "captions", None)
    if captions is None:
        raise DataError(
            f"data.source {data.source} has no captions that are read, which a base conditioned "
            "on text needs: write metadata.jsonl with the columns file_name and text (or a column "
            "text into parquet files or a data set of datasets, or .txt files into tar files), or "
            "set --data base."
        )
    return captions


def shard_inputs(job: EncodeJob) -> Inputs:
    """Return what :func:`encode_images` follows from; the folder's name holds most of it."""
    return {"stage": "latents", "of": job.path.parent.name, "images": [job.first, job.count]}


@functools.lru_cache(maxsize=1)  # a worker does many items on the same data
def _open_latents(data: DataConfig, folder: Path) -> ImageDataset:
    images = load_dataset(data)
    if isinstance(images, BaseSamples):
        return images.latents()
    if missing := missing_shards(folder, len(images), SHARD):
        stage = data.first_stage
        what = CAPTIONS if stage is None else f"latents of data.first_stage {stage}"
        raise DataError(
            f"{len(missing)} shards of the {what} are missing in {display_path(folder)}: tdc-ray "
            "run computes them. evaluate.cache_dir must lie where all nodes see it."
        )
    learnt = IMAGES if data.first_stage is None else LATENTS
    labels = CAPTIONS if TrainingData(data).is_captioned else CLASSES
    return LatentImages(fetch(folder), images, learnt, labels)

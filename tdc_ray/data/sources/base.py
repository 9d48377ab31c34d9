"""Images that were drawn from the base itself (``runs.stages.base_samples`` draws them).

What they are is known, and can be opened, before they are drawn: a file beside the shards says it.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.data.dataset import ImageBatch
from tdc_ray.data.prompts import load_states
from tdc_ray.data.tensor_shards import missing_shards, read_rows
from tdc_ray.errors import ConfigError, DataError
from tdc_ray.models.labels import map_captions
from tdc_ray.storage.files import exists, fetch, read_json
from tdc_ray.storage.object_store import display_path, resolve_path

BASE_SHARD = 64
"""Images of a shard: what an interruption loses at most, and the least share of a worker."""

SAMPLES_FILE = "samples.json"
"""File of a folder that says what is drawn into it, or was."""


@dataclass(frozen=True, kw_only=True)
class SamplesInfo:
    """What is drawn into a folder."""

    num_images: int
    num_classes: int | None
    """None means that the base is unconditional."""

    shape: tuple[int, int, int]
    """``(C, H, W)`` of an image."""

    num_prompts: int | None = None
    """None means that the base is not conditioned on text."""


_ADAPTER = TypeAdapter(SamplesInfo)


class BaseSamples:
    """Images of a base, or their latents, in shards of which only what is asked for is read."""

    def __init__(self, folder: Path, info: SamplesInfo, tensor: str = "images") -> None:
        """Wrap the folder of the shards, which may be yet to be drawn; one tensor is read."""
        self.num_classes = info.num_classes
        self._folder, self._info, self._tensor = folder, info, tensor
        self._is_whole = False

    def latents(self) -> "BaseSamples":
        """Return the latents that the images were decoded from, with the same labels."""
        return BaseSamples(self._folder, self._info, "latents")

    def __len__(self) -> int:
        return self._info.num_images

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        """Fetch a batch; where images were drawn for prompts, the labels are these's states."""
        self.check()
        batch = read_rows(self._folder, self._tensor, indices, BASE_SHARD)
        if self._info.num_prompts is None:
            return batch
        numbers, prompts = batch.labels, load_states(self._folder).prompts
        assert isinstance(numbers, Tensor)
        return ImageBatch(batch.images, map_captions(lambda tensor: tensor[numbers], prompts))

    def check(self) -> None:
        """Check that all images are there.

        Raises:
            DataError: Some are not.
        """
        if self._is_whole:
            return
        if missing := missing_shards(self._folder, len(self), BASE_SHARD):
            raise DataError(
                f"{len(missing)} shards of the base's samples are missing in "
                f"{display_path(self._folder)}: tdc-ray run and tdc-ray prune draw them. "
                "evaluate.cache_dir must lie where all nodes see it."
            )
        fetch(self._folder)
        self._is_whole = True

    def fingerprint(self) -> str:
        """Return a name for the content, by all that it is drawn by."""
        return self._folder.name


def open(config: DataConfig) -> BaseSamples:
    """Open the samples of a folder, drawn or not.

    Raises:
        ConfigError: No base was named.
        DataError: The folder is none of such samples, or of those of another shape.
    """
    if config.path is None:
        raise ConfigError(
            "data.source base draws images from a base: name it, by tdc-ray run --base BASE "
            "--data base or tdc-ray prune BASE --data base, or name images by --data."
        )
    folder = resolve_path(config.path)
    path = folder / SAMPLES_FILE
    if not exists(path):
        raise DataError(f"{display_path(folder)} holds no samples of a base: no {SAMPLES_FILE}.")
    try:
        info = _ADAPTER.validate_python(read_json(path)["drawn"])
    except (KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{display_path(path)} is malformed: {error}") from error
    if info.shape != config.shape:
        raise DataError(
            f"samples of the base are {info.shape} (channels, height, width), got {config.shape} "
            "in data.image_size and data.num_channels."
        )
    return BaseSamples(folder, info)

"""What results follow from, as JSON values: the parts that stages put together for a store's keys.

Left out are settings that change no result: where things lie, how often is logged or kept, and how
many actors, CPUs or GPUs compute (``compute_settings.DECIDING`` are those that count). So the last
bits of sums, which depend on threads and devices, are taken to be the same, as they are where a
run is continued on another machine. A micro-batch counts: dropout draws by it.
"""

import functools
from dataclasses import asdict
from typing import Any

from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.latents import latents_dir
from tdc_ray.data.load import load_dataset
from tdc_ray.execution.item import Inputs

LOCATION_FIELDS = ("source", "path", "num_workers", "max_corrupt", "cache_dir", "first_stage")
"""Of the data's settings: the fingerprint of what they lead to is taken in their place."""

LOGGING_FIELDS = ("log_every", "checkpoint_every", "keep_checkpoints")
"""Of training's settings: they change no weight."""


def data_key(config: RunConfig) -> Inputs:
    """Give what everything follows from that is trained or measured: seed, data, noise process."""
    return {
        "seed": config.seed,
        "images": images_key(config),
        "data": _without(asdict(config.data), LOCATION_FIELDS),
        "diffusion": asdict(config.diffusion),
        "conditioning": asdict(config.conditioning),
        "tf32": config.compute.tf32,
    }


@functools.lru_cache(maxsize=8)  # it may take a look at every file
def images_key(config: RunConfig) -> str:
    """Name the content of what a denoiser learns: images, or their latents by a first stage."""
    if config.data.first_stage is not None:
        return latents_dir(config).name
    return load_dataset(config.data).fingerprint()


def training_key(config: TrainConfig) -> Inputs:
    """Give what training follows from, beside data and seed."""
    return {"training": _without(asdict(config), LOGGING_FIELDS)}


def _without(document: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}

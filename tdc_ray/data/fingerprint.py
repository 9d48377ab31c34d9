"""What results follow from, as JSON values: the parts that stages put together for a store's keys.

Left out are settings that change no result: where things lie, how often is logged or kept, and how
many actors, CPUs or GPUs compute (``compute_settings.DECIDING`` are those that count). So the last
bits of sums, which depend on threads and devices, are taken to be the same, as they are where a
run is continued on another machine. A micro-batch counts: dropout draws by it.
"""

import functools
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.latents import latents_dir
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.plan import Group
from tdc_ray.execution.item import Inputs
from tdc_ray.storage.files import fetch, read_json

PLACES = ("source", "path", "num_workers", "max_corrupt", "cache_dir", "first_stage")
"""Of the data's settings: the fingerprint of what they lead to is taken in their place."""

HABITS = ("log_every", "checkpoint_every", "keep_checkpoints")
"""Of training's settings: they change no weight."""

SEARCH = (
    "method",
    "channel_multiple",
    "objective",
    "latency_batch_size",
    "memory",
    "num_rounds",
    "num_candidates",
    "halving_steps",
    "num_passes",
    "num_levels",
)
"""Of pruning's settings: they decide what is measured, not what is found."""


def of_run(config: RunConfig) -> Inputs:
    """Give what everything follows from that is trained or measured: seed, data, noise process."""
    return {
        "seed": config.seed,
        "images": of_images(config),
        "data": _without(asdict(config.data), PLACES),
        "diffusion": asdict(config.diffusion),
        "conditioning": asdict(config.conditioning),
        "tf32": config.compute.tf32,
    }


@functools.lru_cache(maxsize=8)  # it may take a look at every file
def of_images(config: RunConfig) -> str:
    """Name the content of what a denoiser learns: images, or their latents by a first stage."""
    if config.data.first_stage is not None:
        return latents_dir(config).name
    return load_dataset(config.data).fingerprint()


def of_group(group: Group) -> Inputs:
    """Give what the work on a group's timesteps follows from."""
    return {"timesteps": [group.first, group.last]}


def of_training(config: TrainConfig) -> Inputs:
    """Give what training follows from, beside data and seed."""
    return {"training": _without(asdict(config), HABITS)}


def of_measuring(config: PruneConfig) -> Inputs:
    """Give what a refit and the losses of one model follow from."""
    return {"measuring": _without(asdict(config), SEARCH)}


def of_weights(folder: Path) -> str:
    """Name the content of a saved model: SHA-256 of its configs and of the weights' files."""
    digest = hashlib.sha256()
    for path in sorted(fetch(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "/." in f"/{name}":  # what a writer left
            continue
        if path.suffix == ".json":
            document = read_json(path)
            known = {key: value for key, value in document.items() if key[0] != "_"}
            digest.update(f"{name} {sorted(known.items())}\n".encode())
        elif path.suffix == ".safetensors":
            found = path.stat()
            content = _sha256(path, found.st_size, found.st_mtime_ns)
            digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)  # a driver asks for every item
def _sha256(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without(document: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}

"""Bases that are given, not trained: settings that come along with them, checks, and the import.

An imported base is a folder: ``unet`` in diffusers' format, ``first_stage`` where the UNet
denoises latents (a diffusers ``VQModel`` or ``AutoencoderKL``), and ``base.json``: the noise
process, how it is sampled, where all came from, and the SHA-256 of the files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdc_ray.config.run import RunConfig, from_json, to_json
from tdc_ray.models.first_stage import downsampling
from tdc_ray.runs.pretrained.sources import (
    BASE_FILE,
    NOISE,
    json_object,
    resolve_base,
)
from tdc_ray.storage.files import exists
from tdc_ray.storage.object_store import resolve_path


def apply_settings(told: Mapping[str, Any], config: RunConfig, *, with_data: bool) -> RunConfig:
    """Bring settings in line with what a base tells.

    Args:
        told: What a base tells, by dotted names.
        config: The settings.
        with_data: Bring the data to the base's resolution and channels, too.

    Raises:
        ConfigError: What it tells is out of a setting's range.
    """
    document = to_json(config)
    images = ("data.image_size", "data.num_channels")
    for name, value in told.items():
        stage, _, setting = name.partition(".")
        if with_data or name not in images:
            document[stage][setting] = value
    timesteps = document["diffusion"]["num_train_timesteps"]
    for stage, setting in (("sampler", "num_inference_steps"), ("plan", "num_groups")):
        if isinstance(timesteps, int):  # else it is refused by name
            document[stage][setting] = min(document[stage][setting], timesteps)
    return from_json(document)


def noise_settings(model: str) -> dict[str, Any]:
    """Give what a model's folder tells of its noise process, first stage and that one's images.

    Raises:
        CheckpointError: It is malformed.
        ConfigError: It is of a kind that cannot be used here.
    """
    folder = resolve_path(model).expanduser()
    for place in (folder, folder.parent):  # a pipeline's UNet lies in a folder below it
        if exists(place / BASE_FILE) or exists(place / "model_index.json"):
            base = resolve_base(str(place))
            names = ("data.first_stage", "sampler.clip_sample")
            told = {
                name: value
                for name, value in base.told.items()
                if name.startswith("diffusion.") or name in names
            }
            if isinstance(base.first_stage, Path):
                told |= _images_told(base.first_stage, base.unet["sample_size"])
            return told
    return {}


def missing_settings(told: Mapping[str, Any]) -> list[str]:
    """Name the settings of the noise process that are not among what a base tells."""
    is_cosine = told.get("diffusion.beta_schedule") == "squaredcos_cap_v2"
    needed = [name for name in NOISE if not (is_cosine and name in ("beta_start", "beta_end"))]
    names = [f"diffusion.{name}" for name in needed]
    return [name for name in names if name not in told]


def _images_told(first_stage: Path, size: object) -> dict[str, Any]:
    """Give the images of latents of a size; nothing if a config lacks it, which is told later."""
    config = json_object(first_stage / "config.json")
    channels, levels = config.get("in_channels"), config.get("block_out_channels")
    if not isinstance(size, int) or not isinstance(channels, int) or not isinstance(levels, list):
        return {}
    return {"data.num_channels": channels, "data.image_size": size * downsampling(config)}

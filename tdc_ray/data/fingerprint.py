"""What results follow from, as JSON values: parts of the keys that stages cache results by.

Left out are settings that change no result: where things lie, how often is logged or kept, and how
many actors, CPUs or GPUs compute (``config.compute.RESULT_FIELDS`` are those that count). So the
last bits of sums, which depend on threads and devices, are taken to be the same, as they are where
a run resumes on another machine. A micro-batch counts: dropout draws by it.
"""

from dataclasses import asdict
from typing import Any

from tdc_ray.config.conditioning import ConditioningConfig
from tdc_ray.config.diffusion import LATER_DIFFUSION_FIELDS, DiffusionConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.latents import TrainingData
from tdc_ray.data.load import images_fingerprint
from tdc_ray.execution.item import Inputs

LOCATION_FIELDS = (
    "source",
    "path",
    "num_images",
    "prompts",
    "num_workers",
    "max_corrupt",
    "cache_dir",
    "text_encoder",
    "first_stage",
)
"""Settings of the data that no key holds: the fingerprint of the images replaces them."""

LOGGING_FIELDS = ("log_every", "checkpoint_every", "keep_checkpoints")
"""Settings of training that change no weight."""

LATER_FIELDS = {"allocation": "equal", "optimizer_state": "new", "distillation_share": 0.0}
"""Settings of training that came after the first caches, and what was so before them: a key holds
other values alone."""


def data_key(
    data: TrainingData,
    *,
    seed: int,
    diffusion: DiffusionConfig,
    conditioning: ConditioningConfig,
    tf32: bool,
) -> Inputs:
    """Return what all that is trained or measured follows from: data, seed, noise process."""
    return {
        "seed": seed,
        "images": images_key(data),
        "data": without(asdict(data.data), LOCATION_FIELDS),
        "diffusion": diffusion_key(diffusion),
        "conditioning": conditioning_key(conditioning),
        "tf32": tf32,
    }


def conditioning_key(conditioning: ConditioningConfig) -> Inputs:
    """Return what models are conditioned on; a dropout of captions only where there is one."""
    before = () if conditioning.caption_dropout else ("caption_dropout",)
    return without(asdict(conditioning), before)


def diffusion_key(diffusion: DiffusionConfig) -> Inputs:
    """Return the noise process, and what is predicted of it.

    A key holds settings that came after the first caches only where they are no defaults.
    """
    document, default = asdict(diffusion), DiffusionConfig()
    as_before = tuple(
        name for name in LATER_DIFFUSION_FIELDS if document[name] == getattr(default, name)
    )
    return without(document, as_before)


def images_key(data: TrainingData) -> str:
    """Return a name for the content that a denoiser learns: images, or their latents."""
    return images_fingerprint(data.data) if data.latents is None else data.latents.name


def training_key(config: TrainConfig) -> Inputs:
    """Return what training follows from, beside data and seed."""
    settings = without(asdict(config), LOGGING_FIELDS)
    as_before = [name for name, value in LATER_FIELDS.items() if settings.get(name) == value]
    return {"training": without(settings, tuple(as_before))}


def without(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return settings without those that change no result."""
    return {name: value for name, value in settings.items() if name not in names}

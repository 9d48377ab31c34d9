"""The text encoder of a diffusers pipeline, which turns prompts into states."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tdc_ray.errors import CheckpointError, ConfigError, is_from_outside
from tdc_ray.models.diffusers_folder import MALFORMED
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.storage.files import exists, fetch
from tdc_ray.storage.object_store import display_path, resolve_path

TEXT_ENCODER = "text_encoder"
"""Folder of a pipeline that has its text encoder, beside ``tokenizer``."""

NOT_NEEDED = ("unet", "vae", "safety_checker", "feature_extractor", "image_encoder", "scheduler")
"""Parts of a pipeline that prompts do not go through."""

AT_ONCE = 16
"""Prompts that are encoded at once."""


def check_text_encoder(pipeline: str | None) -> Path:
    """Check that there is a text encoder, and the library that reads it; return its pipeline.

    Raises:
        ConfigError: One of the two is missing.
    """
    if pipeline is None:
        raise ConfigError(
            "data.text_encoder must be given for a base that is told prompts and lies in no "
            "pipeline: set --data.text-encoder to the folder of one, as diffusers saves it."
        )
    folder = resolve_path(pipeline)
    if not exists(folder / TEXT_ENCODER / "config.json"):
        raise ConfigError(
            f"data.text_encoder {pipeline} must be the folder of a pipeline, as diffusers saves "
            f"it: it has no {TEXT_ENCODER}/config.json."
        )
    if find_spec("transformers") is None:
        raise ConfigError(
            f"the text encoder of {pipeline} needs transformers: pip install 'tdc-ray[text]'."
        )
    return folder


def text_encoder_digest(pipeline: Path) -> str:
    """Return a digest of a pipeline's text encoder."""
    return weights_digest(pipeline / TEXT_ENCODER)


@torch.inference_mode()
def encode_prompts(pipeline: Path, prompts: Sequence[str]) -> Tensor:
    """Return the states of prompts, by the pipeline's own ``encode_prompt``.

    Returns:
        ``(N, S, C)``, float32.

    Raises:
        CheckpointError: The pipeline's text encoder is missing or malformed.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        loaded = DiffusionPipeline.from_pretrained(
            fetch(pipeline),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # True needs accelerate, and warns without it
            requires_safety_checker=False,
            **dict.fromkeys(NOT_NEEDED),
        )
        parts = [
            loaded.encode_prompt(
                list(prompts[first : first + AT_ONCE]),
                device=torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )[0].float()
            for first in range(0, len(prompts), AT_ONCE)
        ]
    except (OSError, *MALFORMED) as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(
            f"{display_path(pipeline)} has no text encoder that can be used: "
            f"{type(error).__name__}: {error}"
        ) from error
    return torch.cat(parts)

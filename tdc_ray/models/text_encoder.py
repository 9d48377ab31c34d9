"""The text encoder of a diffusers pipeline, which turns prompts into states."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from tdc_ray.errors import CheckpointError, ConfigError, is_from_outside
from tdc_ray.models.diffusers_folder import MALFORMED
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.storage.digest import cached_file_digest, json_digest
from tdc_ray.storage.files import fetch, listing
from tdc_ray.storage.object_store import display_path, resolve_path

TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""Folders of a pipeline that prompts go through."""

NOT_NEEDED = ("unet", "vae", "safety_checker", "feature_extractor", "image_encoder", "scheduler")
"""Parts of a pipeline that prompts do not go through."""

AT_ONCE = 16
"""Prompts that are encoded at once."""

logger = logging.getLogger(__name__)


def check_text_encoder(pipeline: str | None) -> Path:
    """Check that there is a text encoder, and the library that reads it; return its pipeline.

    Raises:
        ConfigError: One of the two is missing.
    """
    if pipeline is None:
        raise ConfigError(
            "data.text_encoder must be given for a base conditioned on text that lies in no "
            "pipeline: set --data.text-encoder to the folder of one, as diffusers saves it."
        )
    folder = resolve_path(pipeline)
    if not listing(folder / TEXT_ENCODER, "*.safetensors"):
        raise ConfigError(
            f"data.text_encoder {pipeline} must be the folder of a pipeline, as diffusers saves "
            f"it: its {TEXT_ENCODER} has no safetensors."
        )
    if find_spec("transformers") is None:
        raise ConfigError(
            f"the text encoder of {pipeline} needs transformers: pip install 'tdc-ray[text]'."
        )
    return folder


def text_encoder_digest(pipeline: Path) -> str:
    """Return a digest of a pipeline's text encoder and tokenizer."""
    words = [cached_file_digest(fetch(path)) for path in listing(pipeline / TOKENIZER, "*")]
    return json_digest([weights_digest(pipeline / TEXT_ENCODER), words])


@torch.inference_mode()
def encode_prompts(
    pipeline: Path, prompts: Sequence[str], device: torch.device | None = None
) -> Tensor:
    """Return the states of prompts, by the pipeline's own ``encode_prompt``.

    Prompts of more tokens than the encoder takes are cut, as there, and a warning says how many.

    Args:
        pipeline: Has the text encoder.
        prompts: The prompts.
        device: What computes; None means the CPU, which the states end on in any case.

    Returns:
        ``(N, S, C)``, float32.

    Raises:
        CheckpointError: The pipeline's text encoder is missing or malformed.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = device or torch.device("cpu")
    folder = fetch(pipeline)
    # Of a variant alone, as of networks (`diffusers_folder`); diffusers names it after the stem.
    plain = [path for path in listing(folder / TEXT_ENCODER, "*.safetensors") if _is_plain(path)]
    try:
        loaded = DiffusionPipeline.from_pretrained(
            folder,
            variant=None if plain else "fp16",
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,  # True needs accelerate, and warns without it
            requires_safety_checker=False,
            **dict.fromkeys(NOT_NEEDED),
        )
        loaded.to(device, torch.float32)
        _warn_of_cut(loaded.tokenizer, prompts)
        parts = [
            loaded.encode_prompt(
                list(prompts[first : first + AT_ONCE]),
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )[0].cpu()
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


def _is_plain(path: Path) -> bool:
    return "fp16" not in path.name


def _warn_of_cut(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Say how many prompts have too many tokens; diffusers would print each of them."""
    diffusers_logging.get_logger("diffusers.pipelines").setLevel(logging.ERROR)
    most = tokenizer.model_max_length
    num_cut = sum(len(ids) > most for ids in tokenizer(list(prompts)).input_ids)
    if num_cut:
        logger.warning("%d of %d prompts are cut to %d tokens", num_cut, len(prompts), most)

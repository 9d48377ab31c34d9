"""Features of CLIP and DINOv2, by transformers: from a folder, or from the hub.

CLIP's are its projected image embeddings (arXiv:2203.06026), DINOv2's its class token after the
last norm (arXiv:2306.04675). Images are resized as for Inception, by clean-fid's bicubic filter.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cleanfid.resize import make_resizer
from huggingface_hub import snapshot_download
from torch import Tensor

from tdc_ray.config.evaluate import HUB_MODELS, EvaluateConfig
from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.errors import EvaluationError
from tdc_ray.storage.digest import cached_file_digest, json_digest
from tdc_ray.storage.files import atomic_path, exists, fetch, read_json
from tdc_ray.storage.object_store import display_path, resolve_path

HubKind = Literal["clip", "dinov2"]

FILES = ("config.json", "model.safetensors")

MODEL_TYPES = {"clip": ("clip", "clip_vision_model"), "dinov2": ("dinov2",)}
"""``model_type`` of networks that have these features."""

STATISTICS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of the colours in [0, 1] that each was trained on."""

DINOV2_SIZE = 224
"""Pixels of DINOv2's inputs, whatever it was trained with last; CLIP's have one size."""


def check_folder(kind: HubKind, evaluate: EvaluateConfig) -> None:
    """Check the network that is named by a folder.

    Raises:
        EvaluationError: Files are missing, or they are of another network.
    """
    name = evaluate.features_model
    if name is None or not exists(resolve_path(name)):
        return
    folder = resolve_path(name)
    for file in FILES:
        if not exists(folder / file):
            raise EvaluationError(
                f"evaluate.features_model {name} must be a folder that holds {' and '.join(FILES)}"
                f", and has no {file}."
            )
    document = read_json(folder / "config.json")
    found = document.get("model_type") if isinstance(document, dict) else None
    if found not in MODEL_TYPES[kind]:
        raise EvaluationError(
            f"evaluate.features_model {name} must be of model_type {MODEL_TYPES[kind][0]} for "
            f"evaluate.features {kind}, got {found}."
        )


def hub_folder(kind: HubKind, evaluate: EvaluateConfig) -> Path:
    """Return the folder of a network: the one that is named, or the cache's, filled from the hub.

    Raises:
        EvaluationError: It is not available, or is another network.
    """
    name = evaluate.features_model or HUB_MODELS[kind]
    folder = resolve_path(name)
    if not exists(folder):
        cache = resolve_path(evaluate.cache_dir)
        folder = cache / "networks" / name.replace("/", "--")
        if not all(exists(folder / file) for file in FILES):
            _download(name, folder)
        name = str(folder)
    check_folder(kind, EvaluateConfig(features=kind, features_model=name))
    return folder


def hub_extractor_name(kind: HubKind, folder: Path) -> str:
    """Return the extractor in words; equal words are equal features."""
    digest = json_digest([cached_file_digest(fetch(folder / file)) for file in FILES])[:16]
    return f"{kind} of transformers ({folder.name}, {digest}; clean, bicubic)"


def load_hub_extractor(
    kind: HubKind, folder: Path, device: torch.device
) -> Callable[[Tensor], FloatArray]:
    """Load the extractor of features, float64 ``(B, D)``, of uint8 images ``(B, C, H, W)``.

    Raises:
        EvaluationError: Its files cannot be loaded.
    """
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    network_class: Any = CLIPVisionModelWithProjection if kind == "clip" else Dinov2Model
    for file in FILES:
        fetch(folder / file)
    try:
        network = network_class.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EvaluationError(
            f"{display_path(folder)} cannot be loaded as {kind}: {str(error).splitlines()[0]}"
        ) from error
    size = network.config.image_size if kind == "clip" else DINOV2_SIZE
    resize = make_resizer("PIL", False, "bicubic", (size, size))  # noqa: FBT003
    return partial(_features, network.to(device).eval(), kind, resize, device)


@torch.inference_mode()
def _features(
    network: Any, kind: HubKind, resize: Callable[..., Any], device: torch.device, images: Tensor
) -> FloatArray:
    colour = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)
    resized = np.stack([resize(image) for image in colour]) / 255
    mean, deviation = (torch.tensor(one).view(3, 1, 1) for one in STATISTICS[kind])
    pixels = (torch.from_numpy(resized).float().permute(0, 3, 1, 2) - mean) / deviation
    output = network(pixel_values=pixels.to(device))
    features: Tensor = output.image_embeds if kind == "clip" else output.pooler_output
    return features.double().cpu().numpy()


def _download(name: str, folder: Path) -> None:
    try:
        downloaded = Path(snapshot_download(name, allow_patterns=list(FILES)))
        for file in FILES:
            with atomic_path(folder / file) as temporary:
                shutil.copyfile(downloaded / file, temporary)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{name} is neither a folder here nor available from the Hugging Face hub with "
            f"{' and '.join(FILES)}: {str(error).splitlines()[0].rstrip('.')}. Name a folder by "
            "--evaluate.features-model."
        ) from error

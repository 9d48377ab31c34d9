"""The frozen first stage of latent diffusion: encodes images, decodes latents (arXiv:2112.10752).

It is a folder as diffusers saves a ``VQModel``, an ``AutoencoderKL`` or an ``AutoencoderDC``. Its
``config.json`` must name ``scaling_factor``: diffusers' default is Stable Diffusion's, and ruins
the samples of others.
"""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from diffusers import AutoencoderDC, AutoencoderKL, VQModel
from torch import Tensor, nn

from tdc_ray.config.data import DataConfig
from tdc_ray.config.image_size import size_text
from tdc_ray.errors import CheckpointError, ConfigError, StorageError
from tdc_ray.models.diffusers_folder import load_pretrained, weight_files
from tdc_ray.models.finite import check_finite
from tdc_ray.models.network_config import FirstStageConfig, NetworkConfig, image_size
from tdc_ray.storage.digest import cached_file_digest, json_digest
from tdc_ray.storage.files import atomic_path, exists, fetch, read_json
from tdc_ray.storage.object_store import display_path, resolve_path

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

KINDS = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}

Autoencoder: TypeAlias = VQModel | AutoencoderKL | AutoencoderDC

BATCH = 16
"""Images per forward pass, so that any number of them needs bounded memory."""

Shape = tuple[int, int, int]
"""``(C, H, W)``"""


class FirstStage(nn.Module):
    """A model of :data:`KINDS` between images in [-1, 1] and the denoiser's latents."""

    model: Autoencoder

    def __init__(self, model: Autoencoder) -> None:
        """Wrap a model and freeze it."""
        super().__init__()
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.scaling_factor = float(model.config["scaling_factor"])
        self.shift_factor = float(model.config.get("shift_factor") or 0.0)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def factor(self) -> int:
        """Pixels of an image for each of its latents, by height and by width."""
        return downsampling(widths_of(self.model.config))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images ``(B, C, H, W)`` in [-1, 1] to latents ``(B, c, h, w)``, float32.

        Of a ``VQModel`` they are not quantised; of an ``AutoencoderKL`` they are the posterior's
        mode, not a sample of it, so that an image's latents are always the same.
        """
        return torch.cat([self._encode(part) for part in images.split(BATCH)]).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(B, c, h, w)`` to images ``(B, C, H, W)`` in about [-1, 1], float32.

        A ``VQModel`` quantises them first.
        """
        return torch.cat([self._decode(part) for part in latents.split(BATCH)]).float()

    def _encode(self, images: Tensor) -> Tensor:
        encoded = self.model.encode(images.to(self.dtype))
        latents: Tensor
        if isinstance(self.model, VQModel):
            latents = encoded.latents
        elif isinstance(self.model, AutoencoderDC):
            latents = encoded.latent
        else:
            latents = encoded.latent_dist.mode()
        return (latents - self.shift_factor) * self.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.dtype) / self.scaling_factor + self.shift_factor
        images: Tensor = self.model.decode(scaled).sample
        return images


def load_first_stage(folder: Path) -> FirstStage:
    """Load a first stage, from safetensors alone, on the CPU.

    Raises:
        CheckpointError: There is none, or it is malformed.
    """
    return FirstStage(load_autoencoder(folder, str(_config(folder)["_class_name"])))


def load_autoencoder(folder: Path, name: str) -> Autoencoder:
    """Load a model of a class of :data:`KINDS` that diffusers saved.

    Raises:
        CheckpointError: It is not that, or it is malformed.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise CheckpointError(
            f"{display_path(folder)} must hold one of {', '.join(KINDS)}, got {name}."
        )
    model: Autoencoder = load_pretrained(kind, resolve_path(folder))
    return model


def save_first_stage(model: VQModel | AutoencoderKL, folder: Path) -> None:
    """Save config and weights as diffusers does; each file appears when it is whole."""
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            with atomic_path(folder / name) as temporary:
                shutil.move(Path(saved) / name, temporary)


def first_stage_digest(folder: Path) -> str:
    """Return 16 hex digits that name what decides the latents: weights and config.

    Raises:
        CheckpointError: A file is missing or malformed.
    """
    config = {
        name: value
        for name, value in _config(folder).items()
        if name not in _IRRELEVANT and value is not None
    }
    return json_digest([config, cached_file_digest(fetch(_weights_file(folder)))])[:16]


def _weights_file(folder: Path) -> Path:
    """Return the file of a first stage's weights.

    Raises:
        CheckpointError: There is none, or more than one.
    """
    _, files = weight_files(resolve_path(folder), "first stage")
    if len(files) > 1:
        raise CheckpointError(
            f"{display_path(folder)} must hold its weights in one file, got {len(files)}: save it "
            'by diffusers\' save_pretrained(OTHER, max_shard_size="100GB"), and give that folder.'
        )
    return files[0]


def copy_first_stage(folder: Path, to: Path) -> None:
    """Copy a first stage, unless it is there already.

    Raises:
        StorageError: There is another one.
    """
    if not exists(to / CONFIG_FILE):  # which comes last
        with atomic_path(to) as temporary:
            temporary.mkdir()
            # under the name that diffusers loads unasked
            shutil.copyfile(fetch(_weights_file(folder)), temporary / WEIGHTS_FILE)
            shutil.copyfile(fetch(resolve_path(folder)) / CONFIG_FILE, temporary / CONFIG_FILE)
    if first_stage_digest(to) != first_stage_digest(folder):
        raise StorageError(
            f"data.first_stage {folder} is no longer the one that {display_path(to)} is a copy "
            "of. Put that one back to go on, or choose another --run-dir."
        )


def input_shape(data: DataConfig) -> Shape:
    """Return the shape of what a denoiser is trained on: images, or a first stage's latents.

    Raises:
        CheckpointError: The first stage is missing or malformed.
        ConfigError: The first stage does not take the images.
    """
    if data.first_stage is None:
        return data.shape
    config = _config(Path(data.first_stage))
    factor = downsampling(widths_of(config))
    if config["in_channels"] != data.num_channels or data.height % factor or data.width % factor:
        raise ConfigError(
            f"data.first_stage {data.first_stage} takes images of {config['in_channels']} "
            f"channels and a size that {factor} divides, got data.num_channels "
            f"{data.num_channels} and data.image_size {size_text(data.image_size)}."
        )
    channels = config["latent_channels"]
    if config["_class_name"] == "VQModel":
        channels = config.get("vq_embed_dim") or channels
    return (channels, data.height // factor, data.width // factor)


def widths_of(config: Mapping[str, Any]) -> Any:
    """Return the widths of an encoder's levels as a config says them; None if it does not."""
    return config.get("block_out_channels") or config.get("encoder_block_out_channels")


def downsampling(block_out_channels: Sequence[int]) -> int:
    """Return the downsampling factor from images to latents."""
    return int(2 ** (len(block_out_channels) - 1))


def check_latents(data: DataConfig, unet: NetworkConfig, model: str) -> None:
    """Check that a first stage loads, and that its latents are what the model takes.

    Args:
        data: The data, with a first stage or without.
        unet: The model's settings.
        model: Its name in errors.

    Raises:
        CheckpointError: The first stage is missing or malformed.
        ConfigError: It does not fit the images or the model.
    """
    if data.first_stage is None:
        return
    latents = input_shape(data)
    expected = (unet["in_channels"], *image_size(unet))
    if latents != expected:
        raise ConfigError(
            f"data.first_stage {data.first_stage} turns images of {data.height}x{data.width} "
            f"into latents of {_text(latents)}, and {model} takes "
            f"{_text(expected)} (channels x height x width). Choose another data.image_size, "
            "first stage or architecture."
        )
    load_first_stage(Path(data.first_stage))
    check_finite([resolve_path(data.first_stage)])


_IRRELEVANT = ("_diffusers_version", "_name_or_path")
"""Config entries that do not change what the model computes."""


def _config(folder: Path) -> FirstStageConfig:
    """Load and check the config."""
    path = resolve_path(folder) / CONFIG_FILE
    if not exists(path):
        raise CheckpointError(
            f"data.first_stage {folder} holds no first stage: {CONFIG_FILE} is missing. Name the "
            "folder of a diffusers VQModel, AutoencoderKL or AutoencoderDC."
        )
    try:
        document: object = read_json(path)
    except StorageError as error:
        raise CheckpointError(str(error)) from error
    config: dict[str, Any] = document if isinstance(document, dict) else {}
    kind = config.get("_class_name")
    if kind not in KINDS:
        raise CheckpointError(
            f"data.first_stage {folder} must be one of {', '.join(KINDS)}, got {kind} "
            f"(_class_name in {CONFIG_FILE})."
        )
    needed = ("in_channels", "block_out_channels", "latent_channels", "scaling_factor")
    known = {**config, "block_out_channels": widths_of(config)}
    if missing := [name for name in needed if known.get(name) is None]:
        raise CheckpointError(
            f"{path} must name {', '.join(missing)}: it is never guessed. (scaling_factor is 1.0 "
            "for CompVis's VQ-f4, 0.18215 for Stable Diffusion's.)"
        )
    scale = config["scaling_factor"]
    if not isinstance(scale, int | float) or not math.isfinite(scale) or scale <= 0:
        raise CheckpointError(f"scaling_factor in {path} must be above 0, got {scale}.")
    return cast("FirstStageConfig", config)


def _text(shape: Shape) -> str:
    return "x".join(str(length) for length in shape)

"""Builds, saves and loads ``UNet2DModel``; a folder that exists here loads in diffusers too."""

import inspect
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention

from tdc_ray.errors import CheckpointError
from tdc_ray.models.diffusers_folder import load_pretrained
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.config_file import HEADS_FILE
from tdc_ray.storage.files import atomic_path, fetch, read_json, write_json
from tdc_ray.storage.object_store import display_path

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet2DModel).parameters.items()
} | {"num_heads": None}


def build_unet(config: NetworkConfig) -> UNet2DModel:
    """Build a UNet with random weights on the current default device."""
    unet = UNet2DModel(**{name: value for name, value in config.items() if name != "num_heads"})
    if (num_heads := config.get("num_heads")) is not None:
        set_num_heads(unet, num_heads)
    return unet


def set_num_heads(unet: UNet2DModel, num_heads: int) -> None:
    """Set the same number of heads in every attention, whatever its width; weights stay."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = num_heads
            module.sliceable_head_dim = num_heads
            module.scale = (module.inner_dim // num_heads) ** -0.5


def save_unet(unet: UNet2DModel, folder: Path, *, num_heads: int | None = None) -> None:
    """Save config and weights (safetensors) as diffusers does; the folder appears when whole."""
    # Safetensors cannot hold weights that lie channels last.
    unet.to(memory_format=torch.contiguous_format)
    with atomic_path(folder) as temporary:
        unet.save_pretrained(temporary)
        if num_heads is not None:
            write_json(temporary / HEADS_FILE, {"num_heads": num_heads})


def load_unet(folder: Path) -> UNet2DModel:
    """Load what :func:`save_unet` or diffusers saved, in eval mode, on the CPU.

    Raises:
        CheckpointError: There is no such folder, or it holds no ``UNet2DModel`` in safetensors.
    """
    if not (fetch(folder) / "config.json").exists():
        raise CheckpointError(f"{display_path(folder)} holds no model: config.json is missing.")
    unet: UNet2DModel = load_pretrained(UNet2DModel, folder)
    if (folder / HEADS_FILE).exists():
        set_num_heads(unet, read_json(folder / HEADS_FILE)["num_heads"])
    return unet


def given_unet_config(folder: Path) -> NetworkConfig:
    """Load the config of a UNet from outside; diffusers' defaults fill what it lacks."""
    return cast("NetworkConfig", {**_DEFAULTS, **unet_config(folder)})


def unet_config(folder: Path) -> NetworkConfig:
    """Load the config of a saved UNet without its weights, in the terms of this diffusers."""
    known = inspect.signature(UNet2DModel.__init__).parameters
    document = read_json(fetch(folder) / "config.json")
    config = {name: value for name, value in document.items() if name in known}
    size = config.get("sample_size")
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        config["sample_size"] = size[0]
    if (folder / HEADS_FILE).exists():
        config["num_heads"] = read_json(folder / HEADS_FILE)["num_heads"]
    return cast("NetworkConfig", config)

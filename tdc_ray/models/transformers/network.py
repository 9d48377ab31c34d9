"""Saves and loads transformers of diffusers, and completes what their configs leave open."""

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from tdc_ray.models.diffusers_folder import load_pretrained
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.storage.files import atomic_path, fetch, read_json


def build_transformer(kind: Any, config: NetworkConfig) -> Any:
    """Build a transformer of a class with random weights on the current default device."""
    return completed(kind(**{key: value for key, value in config.items() if key[0] != "_"}))


def completed(network: Any) -> Any:
    """Name the channels that a config leaves open; compute positions, also on the meta device."""
    network.register_to_config(out_channels=network.out_channels)
    patches = network.pos_embed
    if patches.pos_embed.is_meta and patches.pos_embed_max_size is None:  # else it is saved
        positions = get_2d_sincos_pos_embed(
            network.inner_dim,
            patches.height,
            base_size=patches.base_size,
            interpolation_scale=patches.interpolation_scale,
            output_type="pt",
            device=torch.device("cpu"),
        )
        patches.pos_embed = positions.float()[None]
    return network


def save_transformer(network: Any, folder: Path) -> None:
    """Save config and weights (safetensors) as diffusers does; the folder appears when whole."""
    network.to(memory_format=torch.contiguous_format)
    with atomic_path(folder) as temporary:
        network.save_pretrained(temporary)


def load_transformer(kind: Any, folder: Path) -> Any:
    """Load a saved transformer of a class, in eval mode, on the CPU.

    Raises:
        CheckpointError: The folder holds none in safetensors.
    """
    return completed(load_pretrained(kind, folder))


def transformer_config(kind: Any, folder: Path) -> NetworkConfig:
    """Load a saved one's config without its weights; diffusers' defaults fill what it lacks."""
    defaults = {key: value.default for key, value in inspect.signature(kind).parameters.items()}
    document = read_json(fetch(folder) / "config.json")
    config = defaults | {key: value for key, value in document.items() if key in defaults}
    if config["out_channels"] is None:
        config["out_channels"] = config["in_channels"]
    return cast("NetworkConfig", {"_class_name": kind.__name__, **config})

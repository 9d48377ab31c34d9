"""Reads a ``config.json`` of diffusers whose network is to be trained from scratch.

Such a file comes from anywhere: its types, ranges and size are checked before anything is built.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tdc_ray.config.model import ModelConfig
from tdc_ray.config.validation import config_error
from tdc_ray.errors import ConfigError
from tdc_ray.models.network_config import (
    CONDITION_CLASS,
    DEFAULT_CLASS,
    class_name,
)
from tdc_ray.models.transformers.dit import DIT, DiTSettings
from tdc_ray.models.unet2d.config_file import OWN_FILE, UNetConfigFile
from tdc_ray.models.unet2d_condition.config_file import UNetConditionConfigFile
from tdc_ray.storage.files import exists, read_bytes, read_json
from tdc_ray.storage.object_store import display_path, resolve_path

LARGEST_FILE = 1_000_000
"""Most bytes of a config; those of diffusers have about a thousand."""

FILES: Mapping[str, type[BaseModel]] = {
    "UNet2DModel": UNetConfigFile,
    DIT.name: DiTSettings,
    CONDITION_CLASS: UNetConditionConfigFile,
}
"""By the network's class, the types and ranges of its settings."""


def with_file(model: ModelConfig) -> ModelConfig:
    """Return settings that hold the content of the file that ``model.config`` names, if any.

    Raises:
        ConfigError: It is missing or malformed, or has another dropout than ``model.dropout``.
        StorageError: It is no JSON.
    """
    if model.config is None or model.network is not None:
        return model
    network = read_network(model.config)
    dropout = network.pop("dropout")
    if model.dropout and dropout and model.dropout != dropout:
        raise ConfigError(
            f"model.dropout must be {dropout} or 0 for model.config {model.config}, which has "
            f"that, got {model.dropout}."
        )
    return replace(model, network=network, dropout=model.dropout or dropout)


def config_path(source: str) -> Path:
    """Return the path of the file that ``model.config`` names itself, or by its folder."""
    path = resolve_path(source)
    return path if path.suffix == ".json" else path / "config.json"


def read_network(source: str) -> dict[str, Any]:
    """Return all settings of the network that a file, or a folder with a config.json, describes.

    Raises:
        ConfigError: It is missing, of another class, or has unknown or malformed settings.
    """
    path = config_path(source)
    name = f"model.config {display_path(path)}"
    if not exists(path):
        raise ConfigError(
            f"{name} does not exist: name the config.json of a diffusers "
            f"{' or '.join(FILES)}, or its folder."
        )
    if len(read_bytes(path)) > LARGEST_FILE:
        raise ConfigError(f"{name} must have at most {LARGEST_FILE:,} bytes.")
    document = read_json(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{name} must hold a JSON object.")
    kind = str(class_name(document))
    if kind not in FILES:
        raise ConfigError(
            f"{name} is of a {kind}; only a {' or '.join(FILES)} can be trained here, which "
            "takes images, timesteps, and classes or captions (no autoencoder)."
        )
    values = {key: value for key, value in document.items() if not key.startswith("_")}
    if exists(own := path.with_name(OWN_FILE)):
        values |= read_json(own)
    try:
        network = FILES[kind](**values).model_dump(mode="json")
    except (TypeError, ValidationError) as error:
        text = str(config_error(error) if isinstance(error, ValidationError) else error)
        raise ConfigError(f"{name} is no config of a {kind}: {text}") from error
    for later in ("num_heads_upsample", "timestep_channels"):
        if network.get(later, 0) is None:
            del network[later]  # settings of before it was known stay the same
    size = network["sample_size"]
    if isinstance(size, list) and size[0] == size[1]:
        network["sample_size"] = size[0]
    if kind != DEFAULT_CLASS:
        network["_class_name"] = kind
    inputs = network["in_channels"]
    outputs = network["out_channels"] = network["out_channels"] or inputs
    if outputs not in (inputs, 2 * inputs):
        raise ConfigError(
            f"{name} must predict as many channels as it takes, or twice as many with a learned "
            f"variance: found {inputs} in and {outputs} out. Set out_channels to {inputs} in it."
        )
    return network

"""Reads a ``config.json`` of diffusers whose network is to be trained from scratch.

Such a file comes from anywhere: its types, ranges and size are checked before anything is built.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tdc_ray.config.model import ModelConfig
from tdc_ray.config.validation import PositiveInt, Share, config_error
from tdc_ray.errors import ConfigError
from tdc_ray.models.structure import STRUCTURES
from tdc_ray.storage.files import exists, read_bytes, read_json
from tdc_ray.storage.object_store import display_path, resolve_path

HEADS_FILE = "tdc_heads.json"
"""File beside the weights, where ``attention_head_dim`` cannot express the number of heads."""

LARGEST_FILE = 1_000_000
"""Most bytes of a config; those of diffusers have about a thousand."""

Size = Annotated[int, Field(ge=1, le=4096)]
Width = Annotated[int, Field(ge=1, le=65_536)]


class UNetConfigFile(BaseModel):
    """The arguments of ``diffusers.UNet2DModel``, with its defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sample_size: Size | Annotated[list[Size], Field(min_length=2, max_length=2)] | None = None
    in_channels: Width = 3
    out_channels: Width = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: Width | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: list[str] = ["DownBlock2D"] + ["AttnDownBlock2D"] * 3
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: list[str] = ["AttnUpBlock2D"] * 3 + ["UpBlock2D"]
    block_out_channels: Annotated[list[Width], Field(min_length=1, max_length=12)] = [
        224,
        448,
        672,
        896,
    ]
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 2
    mid_block_scale_factor: Annotated[float, Field(gt=0)] = 1
    downsample_padding: Annotated[int, Field(ge=0, le=1)] = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: Share = 0.0
    act_fn: str = "silu"
    attention_head_dim: Width | None = 8
    norm_num_groups: Width = 32
    attn_norm_num_groups: Width | None = None
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: PositiveInt | None = None
    num_train_timesteps: PositiveInt | None = None
    num_heads: Width | None = None
    """No argument of diffusers', but in a file of its own beside the config where it counts."""

    num_heads_upsample: Width | None = None
    """As ``num_heads``."""


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
    path = resolve_path(source).expanduser()
    return path if path.suffix == ".json" else path / "config.json"


def read_network(source: str) -> dict[str, Any]:
    """Return all settings of the UNet that a file, or a folder with a config.json, describes.

    Raises:
        ConfigError: It is missing, of another class, or has unknown or malformed settings.
    """
    path = config_path(source)
    name = f"model.config {display_path(path)}"
    if not exists(path):
        raise ConfigError(
            f"{name} does not exist: name the config.json of a diffusers "
            f"{' or '.join(STRUCTURES)}, or its folder."
        )
    if len(read_bytes(path)) > LARGEST_FILE:
        raise ConfigError(f"{name} must have at most {LARGEST_FILE:,} bytes.")
    document = read_json(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{name} must hold a JSON object.")
    kind = str(document.get("_class_name", "UNet2DModel"))
    if kind not in STRUCTURES:
        raise ConfigError(
            f"{name} is of a {kind}; only a {' or '.join(STRUCTURES)} can be trained here, which "
            "takes images, timesteps and classes (none that is conditioned on text, and no "
            "transformer or autoencoder)."
        )
    values = {key: value for key, value in document.items() if not key.startswith("_")}
    if exists(heads := path.with_name(HEADS_FILE)):
        values |= read_json(heads)
    try:
        network = UNetConfigFile(**values).model_dump(mode="json")
    except (TypeError, ValidationError) as error:
        text = str(config_error(error) if isinstance(error, ValidationError) else error)
        raise ConfigError(f"{name} is no config of a {kind}: {text}") from error
    if network["num_heads_upsample"] is None:
        del network["num_heads_upsample"]  # settings of before it was known stay the same
    size = network["sample_size"]
    if isinstance(size, list) and size[0] == size[1]:
        network["sample_size"] = size[0]
    inputs, outputs = network["in_channels"], network["out_channels"]
    if outputs not in (inputs, 2 * inputs):
        raise ConfigError(
            f"{name} must predict as many channels as it takes, or twice as many with a learned "
            f"variance: found {inputs} in and {outputs} out. Set out_channels to {inputs} in it."
        )
    return network

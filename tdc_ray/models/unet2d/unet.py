"""Builds, saves and loads ``UNet2DModel``.

A folder that is saved here loads in diffusers as the same network, or not at all.
"""

import inspect
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdc_ray.errors import CheckpointError, UnsupportedModelError, is_from_outside
from tdc_ray.models.diffusers_folder import (
    MALFORMED,
    OWN_WEIGHTS_FILE,
    load_pretrained,
    weight_files,
)
from tdc_ray.models.network_config import OWN_SETTINGS, NetworkConfig, num_heads_of
from tdc_ray.models.unet2d.config_file import OWN_FILE
from tdc_ray.storage.files import atomic_path, fetch, read_json, write_json
from tdc_ray.storage.object_store import display_path

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet2DModel).parameters.items()
} | {"num_heads": None}


def build_unet(config: NetworkConfig) -> UNet2DModel:
    """Build a UNet with random weights on the current default device."""
    given = {name: value for name, value in config.items() if name not in OWN_SETTINGS}
    unet = UNet2DModel(**given)
    _set_heads(unet, config)
    if (channels := config.get("timestep_channels")) is not None:
        flips, shift = unet.config["flip_sin_to_cos"], unet.config["freq_shift"]
        unet.time_proj = Timesteps(channels, flips, shift)
        unet.time_embedding.linear_1 = nn.Linear(
            channels, unet.time_embedding.linear_1.out_features
        )
    return unet


def _set_heads(unet: UNet2DModel, config: NetworkConfig) -> None:
    """Set the heads that are no argument of diffusers', if any; weights stay."""
    if config.get("num_heads") is None:
        return
    for name, module in _attentions(unet).items():
        heads = num_heads_of(config, name, module.inner_dim)
        module.heads = module.sliceable_head_dim = heads
        module.scale = (module.inner_dim // heads) ** -0.5


def _attentions(unet: UNet2DModel) -> dict[str, Attention]:
    return {name: part for name, part in unet.named_modules() if isinstance(part, Attention)}


def _own_settings(unet: UNet2DModel) -> dict[str, int]:
    """Return the settings that diffusers would build otherwise of the config alone."""
    with torch.device("meta"):
        plain = UNet2DModel.from_config(unet.config)
    channels = unet.time_embedding.linear_1.in_features
    settings = _heads(unet, plain)
    if channels != plain.time_embedding.linear_1.in_features:
        settings["timestep_channels"] = channels
    return settings


def _heads(unet: UNet2DModel, plain: UNet2DModel) -> dict[str, int]:
    """Return the settings of heads, where they are others than those of a plain UNet."""
    found = {name: part.heads for name, part in _attentions(unet).items()}
    if found == {name: part.heads for name, part in _attentions(plain).items()}:
        return {}
    upsample = {count for name, count in found.items() if name.startswith("up_blocks.")}
    others = {count for name, count in found.items() if not name.startswith("up_blocks.")}
    if len(upsample) > 1 or len(others) != 1:
        raise UnsupportedModelError(
            f"a UNet2DModel whose attentions have {found} heads cannot be saved: those on the way "
            "down and in the middle must have the same number, and so must those on the way up."
        )
    settings = {"num_heads": others.pop()}
    if upsample - set(settings.values()):
        settings["num_heads_upsample"] = upsample.pop()
    return settings


def save_unet(unet: UNet2DModel, folder: Path) -> None:
    """Save config and weights (safetensors) as diffusers does; the folder appears when whole.

    What diffusers would build otherwise of the config is in a file of its own, and the weights are
    under a name that diffusers does not load.

    Raises:
        UnsupportedModelError: Heads differ in a way that cannot be written down.
    """
    # Safetensors cannot hold weights that lie channels last.
    unet.to(memory_format=torch.contiguous_format)
    own = _own_settings(unet)
    with atomic_path(folder) as temporary:
        if not own:
            unet.save_pretrained(temporary)
            return
        unet.save_config(temporary)
        save_file(unet.state_dict(), temporary / OWN_WEIGHTS_FILE)
        write_json(temporary / OWN_FILE, own)


def load_unet(folder: Path) -> UNet2DModel:
    """Load what :func:`save_unet` or diffusers saved, in eval mode, on the CPU.

    Raises:
        CheckpointError: There is no such folder, or it holds no ``UNet2DModel`` in safetensors.
    """
    if not (fetch(folder) / "config.json").exists():
        raise CheckpointError(f"{display_path(folder)} holds no model: config.json is missing.")
    if (folder / OWN_FILE).exists():
        return _load_own(folder)
    unet: UNet2DModel = load_pretrained(UNet2DModel, folder)
    return unet


def _load_own(folder: Path) -> UNet2DModel:
    """Load a UNet that diffusers does not load."""
    _, files = weight_files(folder)  # an earlier version's are under diffusers' names
    state: dict[str, Tensor] = {}
    try:
        for file in files:
            state |= load_file(file)
        unet = build_unet(unet_config(folder))
        unet.load_state_dict(state)
    except (OSError, SafetensorError, *MALFORMED) as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(
            f"{display_path(folder)} holds a damaged UNet2DModel: {error}"
        ) from error
    return unet.eval()


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
    if (folder / OWN_FILE).exists():
        config |= read_json(folder / OWN_FILE)
    return cast("NetworkConfig", config)

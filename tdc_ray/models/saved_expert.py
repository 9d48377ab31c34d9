"""Saves and loads experts: the base's config, which steps of each unit are kept, and safetensors.

diffusers' own ``save_pretrained`` keeps no widths, so a pruned UNet saved by it cannot be loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tdc_ray.errors import CheckpointError, TdcError, is_from_outside
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.diffusers_folder import MALFORMED
from tdc_ray.models.families import build_network, family_of
from tdc_ray.models.network_config import DEFAULT_CLASS, NetworkConfig, class_name
from tdc_ray.models.structure import units_for
from tdc_ray.models.units import KeptIndices
from tdc_ray.storage.files import atomic_path, fetch, read_json, remove, write_json
from tdc_ray.storage.object_store import display_path, resolve_path

CONFIG_FILE = "expert.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class SavedExpert:
    """The description of an expert's network in its folder."""

    unet: NetworkConfig
    """The config of the base that it was pruned from."""

    kept: KeptIndices

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load it from a folder.

        Raises:
            StorageError: There is none.
        """
        document = read_json(folder / CONFIG_FILE)
        kept = {name: tuple(indices) for name, indices in document["kept"].items()}
        return cls(document["unet"], kept)

    def build(self) -> Denoiser:
        """Build the pruned network without weights, on the meta device."""
        with torch.device("meta"):
            base = build_network(self.unet)
        return family_of(base).cut(base, units_for(self.unet, self.kept), self.kept)


def save_expert(folder: Path, unet: Denoiser, config: NetworkConfig, kept: KeptIndices) -> None:
    """Save a pruned UNet; the folder appears when it is whole.

    Args:
        folder: Where to; replaced if it exists.
        unet: The pruned UNet.
        config: The config of the base that it was pruned from.
        kept: What of each unit is kept.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_expert_into(temporary, unet, config, kept)


def save_expert_into(
    folder: Path, unet: Denoiser, config: NetworkConfig, kept: KeptIndices
) -> None:
    """Save a pruned UNet into a folder that holds other things too; see :func:`save_expert`."""
    remove(folder / CONFIG_FILE)  # an old config never goes with new weights
    tensors = {name: value.contiguous() for name, value in unet.state_dict().items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary)
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    if (kind := class_name(config)) != DEFAULT_CLASS:
        plain["_class_name"] = kind
    write_json(folder / CONFIG_FILE, {"unet": plain, "kept": dict(kept)})


@torch.inference_mode(mode=False)  # whose tensors take no gradients, which tracing needs
def load_expert(folder: Path | str) -> UNet2DModel:
    """Load a pruned UNet from a folder, or its URI, in eval mode, on the CPU.

    Raises:
        CheckpointError: The folder holds no expert, or weights and config do not fit.
    """
    folder = resolve_path(folder)
    if not (fetch(folder) / CONFIG_FILE).exists():
        raise CheckpointError(f"{display_path(folder)} holds no expert: {CONFIG_FILE} is missing.")
    try:
        unet: UNet2DModel = SavedExpert.load(folder).build()
        unet.load_state_dict(load_file(folder / WEIGHTS_FILE), assign=True)  # mapped, not copied
    except (OSError, SafetensorError, TdcError, *MALFORMED) as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(f"{display_path(folder)} holds no whole expert: {error}") from error
    return unet.eval()

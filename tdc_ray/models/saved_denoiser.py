"""Saves and loads the experts of a denoiser as one folder: ``config.json``, and safetensors.

Weights that experts have in common are in the files once. Their names are not those of diffusers'
own files, so that no class of diffusers takes the folder for a network of its own.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdc_ray.config.validation import config_error
from tdc_ray.errors import (
    CheckpointError,
    ConfigError,
    TdcError,
    UnsupportedModelError,
    is_from_outside,
)
from tdc_ray.models.diffusers_folder import MALFORMED
from tdc_ray.models.families import FAMILIES, build_network
from tdc_ray.models.network_config import NetworkConfig, class_name
from tdc_ray.models.saved_expert import SavedExpert
from tdc_ray.models.shared_weights import packed_weights, share_equal_weights, unpacked_weights
from tdc_ray.models.units import KeptIndices
from tdc_ray.storage.files import atomic_path, exists, fetch, listing, read_json, write_json
from tdc_ray.storage.object_store import display_path

CONFIG_FILE = "config.json"
WEIGHTS_PATTERN = "experts{suffix}.safetensors"
"""Names of the files of weights, by huggingface_hub's pattern: the suffix is a shard's number."""


class SavedGroup(BaseModel, frozen=True, extra="forbid"):
    """One expert: the timesteps that it serves, and what is kept of the base."""

    first: int | float
    last: int | float
    """Included."""

    kept: dict[str, tuple[int, ...]] = {}
    """By unit; empty means the whole base."""


class SavedDenoiser(BaseModel, frozen=True, extra="forbid"):
    """The content of ``config.json``."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    class_name: Literal["ExpertDenoiser"] = Field(default="ExpertDenoiser", alias="_class_name")
    diffusers_version: str = Field(default=diffusers.__version__, alias="_diffusers_version")
    format: Literal[1] = 1
    base: dict[str, Any]
    """Config of the network that the experts are made of, with its ``_class_name``."""

    timestep_scale: float = 1.0
    experts: tuple[SavedGroup, ...] = Field(min_length=1)

    @property
    def network(self) -> NetworkConfig:
        """The base's config, as the functions of ``models`` take it."""
        return cast("NetworkConfig", self.base)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it from a folder.

        Raises:
            CheckpointError: It is malformed.
            StorageError: There is none.
        """
        path = folder / CONFIG_FILE
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise CheckpointError(
                f"{display_path(path)} is malformed: {config_error(error)}"
            ) from error


def is_denoiser(folder: Path) -> bool:
    """Whether a folder is one that :func:`save_denoiser` wrote."""
    if not exists(folder / CONFIG_FILE):
        return False
    document = read_json(folder / CONFIG_FILE)
    return isinstance(document, dict) and document.get("_class_name") == "ExpertDenoiser"


def build_expert(base: NetworkConfig, kept: KeptIndices) -> nn.Module:
    """Build the network of an expert; its weights are undefined.

    What is pruned needs a row in ``models.families``; a whole network may be of any class of
    diffusers.

    Raises:
        UnsupportedModelError: The class is unknown, or one that cannot be pruned is.
    """
    if kept:
        return cast("nn.Module", SavedExpert(base, kept).build())
    name = class_name(base)
    with no_init_weights():
        if name in FAMILIES:
            return cast("nn.Module", build_network(base))
        kind = getattr(diffusers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
            raise UnsupportedModelError(f"diffusers {diffusers.__version__} has no model {name}.")
        return cast("nn.Module", cast("Any", kind).from_config(base))


def save_denoiser(
    folder: Path,
    saved: SavedDenoiser,
    experts: Sequence[nn.Module],
    *,
    max_shard_size: int | str = "10GB",
) -> None:
    """Save experts; the folder appears when it is whole.

    Args:
        folder: A new or empty folder, or one that this wrote.
        saved: What they are.
        experts: The networks.
        max_shard_size: Weights are split into files of at most this size, such as ``"5GB"``.

    Raises:
        ConfigError: The folder holds something else, or the description builds other networks.
    """
    ours = {CONFIG_FILE, *(path.name for path in listing(folder, "experts*.safetensors*"))}
    others = {path.name for path in listing(folder, "*")} - (
        ours if is_denoiser(folder) else set()
    )
    if others:
        raise ConfigError(
            f"save_pretrained needs a new folder, or one of a denoiser alone, got "
            f"{display_path(folder)}, which has {min(others)} in it. Name another."
        )
    for expert, group in zip(experts, saved.experts, strict=True):
        _check_described(expert, saved.network, group)
    tensors = packed_weights(experts)
    shards = split_torch_state_dict_into_shards(
        tensors, filename_pattern=WEIGHTS_PATTERN, max_shard_size=max_shard_size
    )
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, keys in shards.filename_to_tensors.items():
            save_file({key: tensors[key] for key in keys}, temporary / name)
        write_json(temporary / CONFIG_FILE, saved.model_dump(mode="json"))


def load_denoiser(folder: Path) -> tuple[SavedDenoiser, list[nn.Module]]:
    """Load what :func:`save_denoiser` saved: experts in eval mode, on the CPU.

    Parameters that experts have in common are the same objects.

    Raises:
        CheckpointError: It is malformed, or not whole.
    """
    try:
        saved = SavedDenoiser.load(fetch(folder))
        files = listing(folder, WEIGHTS_PATTERN.format(suffix="*"))
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= load_file(file)  # mapped, not copied
        states = unpacked_weights(tensors, len(saved.experts))
        experts = [build_expert(saved.network, group.kept) for group in saved.experts]
        for expert, state in zip(experts, states, strict=True):
            expert.load_state_dict(state, assign=True)
            expert.eval()
    except (OSError, SafetensorError, *MALFORMED) as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(
            f"{display_path(folder)} holds no whole denoiser: {type(error).__name__}: {error}"
        ) from error
    except TdcError as error:
        if is_from_outside(error):
            raise
        raise CheckpointError(f"{display_path(folder)} holds no denoiser: {error}") from error
    share_equal_weights(experts)
    return saved, experts


def plain_config(network: ModelMixin) -> NetworkConfig:
    """Return the config of a network as diffusers would save it, without where it came from."""
    document: dict[str, Any] = json.loads(network.to_json_string())
    document.pop("_name_or_path", None)
    return cast("NetworkConfig", document)


def _check_described(expert: nn.Module, base: NetworkConfig, group: SavedGroup) -> None:
    """Refuse an expert that would be another network when it is built again.

    Raises:
        ConfigError: Its weights, modules or the numbers that these compute with are others.
    """
    built = build_expert(base, group.kept)
    one, other = _description(built), _description(expert)
    differing = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    numbers = _changed_numbers(built, expert) if not differing else []
    if differing or numbers:
        raise ConfigError(
            f"the expert of timesteps {group.first} to {group.last} is not the network that its "
            f"config describes: {(differing or numbers)[0]} differs. Save it as it was loaded; of "
            "one that was pruned, give ExpertDenoiser what is kept (kept=...)."
        )


def _description(network: nn.Module) -> dict[str, object]:
    modules: dict[str, object] = {name: type(one) for name, one in network.named_modules() if name}
    return modules | {name: value.shape for name, value in network.state_dict().items()}


def _changed_numbers(built: nn.Module, live: nn.Module) -> list[str]:
    """Return the attributes of modules that are numbers, and others than when they were built.

    Dropout is left out: it takes no part in inference, and ``models.families`` may set it.
    """
    return [
        f"{name}.{key}"
        for (name, before), after in zip(built.named_modules(), live.modules(), strict=True)
        for key, value in vars(before).items()
        if "dropout" not in key and _is_number(value)
        if _is_number(now := vars(after).get(key)) and now != value
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@torch.no_grad()
def cast_weights(network: nn.Module, dtype: torch.dtype, in_fp32: Sequence[str]) -> None:
    """Convert floating weights and buffers to another precision.

    Args:
        network: The network.
        dtype: The precision.
        in_fp32: Names of modules that stay in float32 (diffusers' ``_keep_in_fp32_modules``).
    """
    for tensors in (network.named_parameters(), network.named_buffers()):
        for name, tensor in tensors:
            if tensor.is_floating_point():
                kept = any(module in name.split(".") for module in in_fp32)
                tensor.data = tensor.data.to(torch.float32 if kept else dtype)

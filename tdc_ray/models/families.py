"""What can be done with a network: one row for each class of networks.

A class without a row is an ``UnsupportedModelError`` everywhere here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.network_config import NetworkConfig, class_name, row_of
from tdc_ray.models.step import Ends, State, Step
from tdc_ray.models.unet2d.steps import ends, start, steps
from tdc_ray.models.unet2d.surgery import CoupledParameter, coupled_parameters, cut, kept_outputs
from tdc_ray.models.unet2d.unet import build_unet, load_unet, unet_config
from tdc_ray.models.units import KeptIndices, Unit
from tdc_ray.storage.files import fetch, read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What can be done with the networks of one class."""

    build: Callable[[NetworkConfig], Denoiser]
    """Builds a network with random weights, on the current default device."""

    load: Callable[[Path], Denoiser]
    """Loads a saved one, in eval mode, on the CPU."""

    load_config: Callable[[Path], NetworkConfig]
    cut: Callable[[Denoiser, Sequence[Unit], KeptIndices], Denoiser]
    kept_outputs: Callable[[Denoiser, Sequence[Unit], KeptIndices], dict[str, Tensor]]
    coupled_parameters: Callable[[Denoiser, Unit], list[CoupledParameter]]
    ends: Callable[[Denoiser], Ends]
    start: Callable[[Denoiser, Tensor, Tensor, Tensor | None], State]
    steps: Callable[[Denoiser], list[Step]]


FAMILIES: Mapping[str, Family] = {
    "UNet2DModel": Family(
        build=build_unet,
        load=load_unet,
        load_config=unet_config,
        cut=cut,
        kept_outputs=kept_outputs,
        coupled_parameters=coupled_parameters,
        ends=ends,
        start=start,
        steps=steps,
    )
}
"""Rows by the network's class."""


def family_of(network: Denoiser) -> Family:
    """Return the row of a network's class."""
    return row_of(FAMILIES, type(network).__name__)


def steps_of(network: Denoiser) -> list[Step]:
    """Return a network's forward pass as steps."""
    return family_of(network).steps(network)


def build_network(config: NetworkConfig) -> Denoiser:
    """Build a network with random weights on the current default device."""
    return row_of(FAMILIES, class_name(config)).build(config)


def load_network(folder: Path) -> Denoiser:
    """Load a saved network, in eval mode, on the CPU.

    Raises:
        CheckpointError: There is none, or it is malformed.
    """
    return _family_in(folder).load(folder)


def load_config(folder: Path) -> NetworkConfig:
    """Load the config of a saved network without its weights.

    Raises:
        StorageError: There is none, or it is malformed.
    """
    return _family_in(folder).load_config(folder)


def _family_in(folder: Path) -> Family:
    path = fetch(folder) / "config.json"
    return row_of(FAMILIES, class_name(read_json(path) if path.exists() else {}))

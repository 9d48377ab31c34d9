"""What can be done with a network: one row for each class of networks.

Those of diffusers' classes without a row are traced (``models.traced``); any other class is an
``UnsupportedModelError`` everywhere here.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models.denoiser import Denoiser, has_classes
from tdc_ray.models.diffusers_folder import MALFORMED, load_pretrained
from tdc_ray.models.labels import Captions, Labels
from tdc_ray.models.network_config import (
    CONDITION_CLASS,
    CaptionShapes,
    NetworkConfig,
    class_name,
)
from tdc_ray.models.step import Ends, State, Step
from tdc_ray.models.structure import caption_shapes, network_structure
from tdc_ray.models.surgery import cut_units
from tdc_ray.models.traced import network as traced
from tdc_ray.models.traced.graph import (
    check_denoiser,
    class_of,
    takes_captions,
    takes_images_alone,
)
from tdc_ray.models.transformers import network as transformers
from tdc_ray.models.transformers.steps import transformer_steps
from tdc_ray.models.transformers.table import TRANSFORMERS
from tdc_ray.models.transformers.transformer import Transformer
from tdc_ray.models.unet2d.steps import ends, start, steps
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import (
    build_unet,
    given_unet_config,
    load_unet,
    save_unet,
    unet_config,
)
from tdc_ray.models.unet2d_condition import network as condition
from tdc_ray.models.units import KeptIndices, Unit
from tdc_ray.storage.files import fetch, read_json
from tdc_ray.storage.object_store import display_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What can be done with the networks of one class."""

    build: Callable[[NetworkConfig], Denoiser]
    """Builds a network with random weights, on the current default device."""

    load: Callable[[Path], Denoiser]
    """Loads a saved one, in eval mode, on the CPU."""

    save: Callable[[Denoiser, Path], None]
    """Saves an unpruned one and its config as diffusers does."""

    load_config: Callable[[Path], NetworkConfig]
    """Loads the config of what ``save`` saved."""

    given_config: Callable[[Path], NetworkConfig]
    """Loads the config of one from outside; diffusers' defaults fill what it lacks."""

    cut: Callable[[Denoiser, Sequence[Unit], KeptIndices], Denoiser]
    """Returns a pruned copy, given all units and what of each is kept."""

    ends: Callable[[Denoiser], Ends]
    start: Callable[[Denoiser, Tensor, Tensor, Any], State]
    """Returns the state before the first step, of noised images, timesteps and labels: classes,
    ``(B,)``, or captions."""

    steps: Callable[[Denoiser], list[Step]]
    """Splits the forward pass so that every inner unit lies within a step of its name."""


def _checked(load: Callable[[Path], NetworkConfig]) -> Callable[[Path], NetworkConfig]:
    """Make a function that checks types, ranges and known values of the config that it loads."""

    def given_config(folder: Path) -> NetworkConfig:
        config = load(folder)
        network_structure(config)
        return config

    return given_config


def _transformer(transformer: Transformer) -> Family:
    """Make the row of a class of transformers."""
    load_config = partial(transformers.transformer_config, transformer)
    return Family(
        build=partial(transformers.build_transformer, transformer),
        load=partial(transformers.load_transformer, transformer),
        save=transformers.save_transformer,
        load_config=load_config,
        given_config=_checked(load_config),
        cut=partial(cut_units, remove=partial(transformers.remove_branches, transformer)),
        ends=partial(transformers.transformer_ends, transformer),
        start=partial(transformers.first_state, transformer),
        steps=partial(transformer_steps, transformer),
    )


_condition_config = partial(transformers.config_in, kind=UNet2DConditionModel)

FAMILIES: Mapping[str, Family] = {
    "UNet2DModel": Family(
        build=build_unet,
        load=load_unet,
        save=save_unet,
        load_config=unet_config,
        given_config=given_unet_config,
        cut=cut,
        ends=ends,
        start=start,
        steps=steps,
    ),
    **{name: _transformer(one) for name, one in TRANSFORMERS.items()},
    CONDITION_CLASS: Family(
        build=condition.build_unet,
        load=condition.load_unet,
        save=transformers.save_transformer,
        load_config=_condition_config,
        given_config=_checked(_condition_config),
        cut=cut,
        ends=condition.ends,
        start=condition.start,
        steps=condition.steps,
    ),
}
"""Rows by the network's class."""


def family_of(network: Denoiser) -> Family:
    """Return the row of a network's class."""
    return _family(type(network).__name__)


def _family(name: str) -> Family:
    """Return the row of a class; one of diffusers' that has none is traced.

    Raises:
        UnsupportedModelError: diffusers has no such class, or it is none of a denoiser.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    kind = check_denoiser(name, FAMILIES)
    load_config = partial(transformers.config_in, kind=kind)
    return Family(
        build=partial(traced.build, kind),
        load=partial(load_pretrained, kind),
        save=transformers.save_transformer,
        load_config=load_config,
        given_config=_checked(load_config),
        cut=cut_units,
        ends=traced.ends,
        start=traced.start,
        steps=traced.steps,
    )


def captions_read(network: Denoiser) -> CaptionShapes:
    """Return what a network reads of a caption: nothing, if it is not conditioned on any."""
    return caption_shapes(type(network).__name__, network.config)


def labels_for(network: Denoiser, labels: Tensor | Captions) -> Labels:
    """Return what a network is conditioned on, of the labels of images."""
    if isinstance(labels, Tensor):
        return labels if has_classes(network) else None
    return {name: labels[name] for name in captions_read(network)}


def blank_labels(network: Denoiser, count: int) -> Labels:
    """Return what stands for the labels of so many images where it does not matter: zeros."""
    if shapes := captions_read(network):
        device = network.device
        return {name: torch.zeros(count, *one, device=device) for name, one in shapes.items()}
    return labels_for(network, torch.zeros(count, dtype=torch.long, device=network.device))


def steps_of(network: Denoiser) -> list[Step]:
    """Return a network's forward pass as steps."""
    return family_of(network).steps(network)


def build_network(config: NetworkConfig) -> Denoiser:
    """Build a network with random weights on the current default device."""
    return _family(class_name(config)).build(config)


def load_network(folder: Path) -> Denoiser:
    """Load a saved network, in eval mode, on the CPU.

    Raises:
        CheckpointError: There is none, or it is malformed.
    """
    return _family_in(folder).load(folder)


def save_network(network: Denoiser, folder: Path) -> None:
    """Save an unpruned network as diffusers does; the folder appears when it is whole."""
    family_of(network).save(network, folder)


def load_config(folder: Path) -> NetworkConfig:
    """Load the config of a saved network without its weights.

    Raises:
        StorageError: There is none, or it is malformed.
    """
    return _family_in(folder).load_config(folder)


def given_config(folder: Path) -> NetworkConfig:
    """Load the config of a network that comes from outside, and check it.

    Raises:
        ConfigError: It is of another class.
        CheckpointError: diffusers cannot build a network of it.
    """
    path = folder / "config.json"
    document = read_json(fetch(folder) / "config.json")
    if not isinstance(document, dict):
        raise CheckpointError(f"{display_path(path)} must hold a JSON object.")
    kind = class_name(document)
    check_class(kind, f"{display_path(folder)} holds")
    try:
        config = _family(kind).given_config(folder)
        _build_on_meta(config)
    except MALFORMED as error:
        raise CheckpointError(
            f"diffusers can build no {kind} of {display_path(path)}: {type(error).__name__}: "
            f"{error}"
        ) from error
    return config


def check_class(kind: str, where: str) -> None:
    """Check that networks of a class can be a base, and be pruned.

    Args:
        kind: The class's name.
        where: The error's first words, such as ``FOLDER holds``.

    Raises:
        ConfigError: They cannot.
    """
    if kind in FAMILIES or takes_images_alone(kind):
        return
    known = f"only a {' or '.join(FAMILIES)} can be a base or be pruned."
    if (found := class_of(kind)) is not None and takes_captions(found):
        known += (
            " It reads captions, and neither its config nor its pipeline's says how it is called:"
            " in which units of time, with which latents and states."
        )
    raise ConfigError(f"{where} a {kind}: {known}")


def takes_dropout(kind: str) -> bool:
    """Whether diffusers' class of a name can be built with dropout."""
    return "dropout" in inspect.signature(getattr(diffusers, kind)).parameters


def check_buildable(config: NetworkConfig, name: str) -> None:
    """Check that diffusers can build a network of a config.

    Raises:
        ConfigError: It cannot: values contradict each other.
    """
    try:
        _build_on_meta(config)
    except MALFORMED as error:
        raise ConfigError(
            f"diffusers can build no {class_name(config)} of {name}: {type(error).__name__}: "
            f"{error}"
        ) from error


def _build_on_meta(config: NetworkConfig) -> None:
    with torch.device("meta"):
        build_network(config)


def _family_in(folder: Path) -> Family:
    path = fetch(folder) / "config.json"
    return _family(class_name(read_json(path) if path.exists() else {}))

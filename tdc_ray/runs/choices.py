"""What a run chooses once, so that later calls keep it.

These are its network, its steps by a budget, and the commits of images and base on the hub.
"""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

from tdc_ray.config.budget import LEAST_IMAGES, STEP_FIELDS
from tdc_ray.config.hub import with_recorded_commit
from tdc_ray.config.model import AUTO, ModelConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.run import RunConfig, named_differences, recorded_settings
from tdc_ray.data.load import load_dataset, with_commit
from tdc_ray.errors import ConfigError, LimitError
from tdc_ray.models.config_file import config_path, with_file
from tdc_ray.models.first_stage import input_shape
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.unet2d.auto import auto_unet
from tdc_ray.runs.preflight import check_limits, space_and_plan
from tdc_ray.runs.pretrained.sources import PretrainedBase, resolve_base
from tdc_ray.storage.files import exists

WIDTHS = (1.0, 0.5, 0.25)
"""Factors of the channels of smaller networks, for want of time."""

logger = logging.getLogger(__name__)


def with_pretrained(
    config: RunConfig, recorded: Path | None = None
) -> tuple[RunConfig, PretrainedBase | None]:
    """Find the base that a run starts from.

    Args:
        config: The settings.
        recorded: Settings of an earlier call, if there was one: the commit that it took of a base
            on the hub is kept.

    Returns:
        The settings, naming the commit of a base on the hub unless the recorded ones name none,
        and the base; None where the run trains its own.

    Raises:
        CheckpointError: There is none, or it is malformed.
        ConfigError: It is of a kind that cannot be used here.
    """
    name = config.model.base
    if name is None:
        return config, None
    settings = recorded_settings(recorded)
    before = None if settings is None else settings.model.base
    name = with_recorded_commit(name, before)
    base = resolve_base(name, config.diffusion.prediction_type)
    kept = name if name == before else base.source
    return replace(config, model=replace(config.model, base=kept)), base


def with_choices(config: RunConfig, recorded: Path | None = None) -> RunConfig:
    """Return settings that hold the network which ``--model`` asks for, chosen or read if need be.

    They name the commit of a data set on the hub, too.

    Args:
        config: The settings.
        recorded: Settings of an earlier call, if there was one: the network that it chose, the
            steps that its budget bought, and the commit are kept, whatever became of the images
            and of the workers' speed, and if the file of ``model.config`` moved or is gone.

    Raises:
        ConfigError: The file of ``model.config`` is missing or malformed, or holds another network
            than at the first start, or there is no network for images of this size.
        StorageError: That file is no JSON.
        DataError: The images are missing or malformed.
    """
    before = recorded_settings(recorded)
    config = replace(
        config, data=with_commit(config.data, None if before is None else before.data.path)
    )
    if before is not None:
        config = _with_recorded_network(with_steps_of(config, before), before.model)
    if config.model.config is not None:
        return _filled(config)
    return _chosen(config) if config.model.is_open else config


def _filled(config: RunConfig) -> RunConfig:
    """Read the file of ``model.config``; one without a size takes that of the data."""
    model = with_file(config.model)
    if model.network is None or model.network["sample_size"] is not None:
        return replace(config, model=model)
    _, height, width = input_shape(config.data)
    size = height if height == width else [height, width]
    return replace(config, model=replace(model, network={**model.network, "sample_size": size}))


def with_smaller_network(config: RunConfig, has_room: Callable[[float], bool]) -> RunConfig:
    """Return settings with a smaller network in place of one of auto that takes too long to train.

    It is the largest of the family, with fewer channels or one residual block a level, that there
    is room for, else the smallest, and can be pruned to the limits. One that ``model.width`` or
    ``model.depth`` asked for stays, and so does any that is not auto's.

    Args:
        config: The settings of a run that trains its base.
        has_room: Whether there is room for a network of so many times the macs.
    """
    model = config.model
    was_asked = model.config is not None or (model.width, model.depth) != (1.0, None)
    if model.architecture != AUTO or was_asked or has_room(1.0):
        return config
    network = base_unet(model, config.conditioning)
    macs_before = network_structure(network).macs
    smaller = {macs: one for macs, one in _family(config).items() if macs < macs_before}
    if not smaller:
        return config
    fitting = [macs for macs in smaller if has_room(macs / macs_before)]
    logger.info(
        "--hours %g has no room to train that network: a smaller one is taken (--model.depth %d "
        "keeps it)",
        config.budget.hours,
        network["layers_per_block"],
    )
    return _with_network(config, smaller[max(fitting, default=min(smaller))])


def _family(config: RunConfig) -> dict[int, NetworkConfig]:
    """Return the networks of the family that can be pruned to a run's limits, by their macs."""
    family: dict[int, NetworkConfig] = {}
    for width, depth in product(WIDTHS, (None, 1)):
        with suppress(ConfigError, LimitError):  # too few channels, or nothing left to cut
            network = _of_family(config, width, depth)
            space, plan = space_and_plan(config, network)
            if config.prune.objective == "macs":
                check_limits(config.prune, space, plan)
            family[space.macs_base] = network
    return family


def _chosen(config: RunConfig) -> RunConfig:
    """Choose the network of architecture auto."""
    model = config.model
    return _with_network(config, _of_family(config, model.width, model.depth))


def _of_family(config: RunConfig, width: float, depth: int | None) -> NetworkConfig:
    """Return the network of the family for a run's images.

    Raises:
        ConfigError: It would have too few channels, or has no levels for their size.
    """
    channels, height, width_in_pixels = input_shape(config.data)
    return auto_unet(
        height=height,
        width=width_in_pixels,
        channels=channels,
        num_images=len(load_dataset(config.data)),
        learned_sigma=config.diffusion.learned_sigma,
        scale=width,
        depth=depth,
    )


def _with_network(config: RunConfig, network: NetworkConfig) -> RunConfig:
    """Return settings that hold the network; log it."""
    structure = network_structure(network)
    channels, height, width = input_shape(config.data)
    logger.info(
        "model.architecture auto: %s channels, %d residual blocks a level; %.2f M parameters and "
        "%.2f M macs for %d images of %dx%dx%d",
        ", ".join(map(str, network["block_out_channels"])),
        network["layers_per_block"],
        structure.num_params / 1e6,
        structure.macs / 1e6,
        len(load_dataset(config.data)),
        height,
        width,
        channels,
    )
    model = replace(config.model, network=json.loads(json.dumps(network)))
    return replace(config, model=model)


def with_steps_of(config: RunConfig, before: RunConfig) -> RunConfig:
    """Return settings with the steps that the same budget bought before, if there is one."""
    if before.budget != config.budget or config.budget.flag is None:
        return config
    for stage in ("base", "finetune"):
        asked, bought = getattr(config, stage), getattr(before, stage)
        if bool(asked.num_steps) == bool(bought.num_steps):
            steps = {name: getattr(bought, name) for name in STEP_FIELDS}
            config = replace(config, **{stage: replace(asked, **steps)})
    if config.budget.hours is None:
        return config
    usual = preset(config.preset)
    for stage, names in LEAST_IMAGES.items():
        asked = getattr(config, stage)
        chosen = {
            name: getattr(getattr(before, stage), name)
            for name in names
            if getattr(asked, name) == getattr(getattr(usual, stage), name)
        }
        config = replace(config, **{stage: replace(asked, **chosen)})
    return config


def _with_recorded_network(config: RunConfig, before: ModelConfig) -> RunConfig:
    """Return settings with the network that was asked for in the same way."""
    model = config.model
    if before.network is None or model.base is not None:
        return config
    kept = replace(model, network=before.network)
    if model.config is None:
        asked = ("architecture", "width", "depth", "config")
        is_same = all(getattr(model, name) == getattr(before, name) for name in asked)
        return replace(config, model=kept) if is_same else config
    if before.config is None:
        return config
    if model.network is None and not exists(config_path(model.config)):
        logger.warning(
            "%s does not exist: the run keeps the network that it began with.", model.name
        )
        return replace(config, model=replace(kept, dropout=model.dropout or before.dropout))
    now = _filled(config).model
    if changed := named_differences(before.network, now.network or {}):
        raise ConfigError(
            f"{model.name} is not what it was at the first start ({'; '.join(changed)}). Restore "
            "the file, or remove it, to resume the run with the network that it began with; for "
            "the new network choose another --run-dir."
        )
    return replace(config, model=replace(now, network=before.network))

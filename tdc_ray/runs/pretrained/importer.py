"""Imports a pretrained base into a folder, converted if necessary.

The folder has ``unet`` in diffusers' format, ``first_stage`` where the UNet denoises latents (a
model of ``first_stage.KINDS``), and ``base.json``: the noise process, the sampler, the
source, and the SHA-256 of the files.
"""

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path

from diffusers import VQModel

from tdc_ray.config.image_size import size_text
from tdc_ray.config.model import AUTO
from tdc_ray.config.run import RunConfig
from tdc_ray.config.validation import errors_together, refuse
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models.families import build_network, save_network, takes_dropout
from tdc_ray.models.finite import check_finite
from tdc_ray.models.first_stage import Autoencoder, downsampling, load_autoencoder
from tdc_ray.models.network_config import (
    NetworkConfig,
    class_name,
    image_size,
    sample_size,
)
from tdc_ray.models.structure import network_structure, reads_text
from tdc_ray.models.unet2d.architectures import (
    ARCHITECTURES,
    architecture,
    with_head_channels,
    with_heads,
)
from tdc_ray.runs.pretrained.prediction import prediction_doubt
from tdc_ray.runs.pretrained.settings import SAMPLER
from tdc_ray.runs.pretrained.sources import (
    BASE_FILE,
    FORMAT,
    PackedFirstStage,
    PretrainedBase,
    json_object,
)
from tdc_ray.storage.digest import file_digest
from tdc_ray.storage.files import atomic_path, exists, fetch, write_json
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import FIRST_STAGE_DIR

logger = logging.getLogger(__name__)


OTHERS = ("data.first_stage", "data.text_encoder")
"""Settings of a base that a run may have otherwise."""


def check_compatible(base: PretrainedBase, config: RunConfig) -> NetworkConfig:
    """Check that a run's settings are those that a base was trained with; return its UNet's.

    Raises:
        ConfigError: They are not, or the number of heads is not known.
        CheckpointError: The number of heads does not fit the channels.
    """
    diffusion = config.diffusion
    has_no_ends = diffusion.is_flow or diffusion.is_edm
    is_unused = diffusion.beta_schedule == "squaredcos_cap_v2" or has_no_ends
    unused = ("diffusion.beta_start", "diffusion.beta_end") if is_unused else ()
    known = base.settings.by_name()
    if "diffusion.prediction_type" in known:
        known.setdefault("diffusion.sigma_data", None)  # not of EDM
    with errors_together():
        for name, expected in known.items():
            stage, _, setting = name.partition(".")
            # Another first stage or text encoder may be named, and another sampler.
            if name in (*OTHERS, *unused) or stage == "sampler":
                continue
            value = getattr(getattr(config, stage), setting)
            is_float = isinstance(expected, float)
            if math.isclose(value, expected) if is_float else value == expected:
                continue
            if setting == "image_size":
                expected, value = size_text(expected), size_text(value)
            refuse(
                f"{name} must be {expected}, as was found in the base {base.source}, got {value}. "
                f"Set --{name.replace('_', '-')} to that, or give another base."
            )
    settings = _unet_settings(base, config)
    name = class_name(settings)
    if config.model.dropout and not takes_dropout(name):
        raise ConfigError(
            f"model.dropout must be 0 for {base.source}, a {name}, which has no dropout, got "
            f"{config.model.dropout}."
        )
    return settings


def check_weights(base: PretrainedBase) -> None:
    """Check that a base's weights are there, and are numbers.

    Raises:
        CheckpointError: A file is damaged, of a variant alone, or a tensor of it holds NaN.
    """
    folders = [path for path in (base.folder, base.first_stage) if isinstance(path, Path)]
    check_finite(folders if base.folder is not None else base.files)


def import_base(base: PretrainedBase, config: RunConfig, folder: Path) -> NetworkConfig:
    """Write a base into a folder, which appears when it is whole; return its UNet's settings.

    Raises:
        ConfigError: The settings are not those of its training.
        CheckpointError: Its weights are missing, malformed, or no numbers.
        UnsupportedModelError: It has a block of an unknown kind, or cannot halve its images.
    """
    settings = check_compatible(base, config)
    network_structure(settings)
    try:
        check_weights(base)
        weights = base.load_weights(settings, config.model.use_new_attention_order)
        first_stage = _first_stage(base, settings, config.data.first_stage)
    except CheckpointError as error:
        raise CheckpointError(f"{base.source} cannot be imported: {error}") from error
    unet = build_network(with_dropout(settings, config.model.dropout))
    unet.load_state_dict(weights)
    if (doubt := prediction_doubt(unet.eval(), config.diffusion)) is not None:
        logger.warning("%s: %s", base.source, doubt)
    sampler = asdict(config.sampler)
    document = {
        "format": FORMAT,
        "source": base.source,
        "files": {display_path(path): file_digest(fetch(path)) for path in base.files},
        "origin": base.origin,
        "weights": base.weights,
        "told": sorted(base.settings.by_name()),
        "scheduler": base.scheduler,
        "diffusion": asdict(config.diffusion),
        "sampler": {name: sampler[name] for name in SAMPLER},
        "first_stage": None if first_stage is None else FIRST_STAGE_DIR,
    }
    if reads_text(settings):
        scale = config.sampler.guidance_scale
        encoder = config.data.text_encoder
        document["prompts"] = {"text_encoder": encoder, "guidance_scale": scale}
    with atomic_path(folder.absolute()) as temporary:
        save_network(unet, temporary / "unet")
        if first_stage is not None:
            first_stage.save_pretrained(temporary / FIRST_STAGE_DIR)
        write_json(temporary / BASE_FILE, document)
    return settings


def with_dropout(settings: NetworkConfig, dropout: float) -> NetworkConfig:
    """Return a network's settings with the dropout of its training; not all classes take one."""
    return {**settings, "dropout": dropout} if dropout else settings


def _unet_settings(base: PretrainedBase, config: RunConfig) -> NetworkConfig:
    """Return the settings of a base's UNet; what a checkpoint file does not say is the run's."""
    model, (height, width) = config.model, (config.data.height, config.data.width)
    if base.folder is not None:
        for name, given in model.attentions.items():
            raise ConfigError(
                f"model.{name} goes with openai: and compvis: alone, got {given}: "
                f"{base.source} has its own. Leave it out."
            )
        return {**base.unet, "sample_size": base.unet["sample_size"] or sample_size(height, width)}
    if model.num_heads is not None or model.num_head_channels is not None:
        if isinstance(base.first_stage, PackedFirstStage):
            factor = downsampling(base.first_stage.config()["block_out_channels"])
            height, width = height // factor, width // factor
        if model.num_head_channels is not None:
            unet = with_head_channels(base.unet, model.num_head_channels)
        else:
            assert model.num_heads is not None
            unet = with_heads(base.unet, model.num_heads, model.num_heads_upsample)
        return {**unet, "sample_size": sample_size(height, width)}
    if model.architecture == AUTO:
        raise ConfigError(
            f"{base.source} does not say how many heads its attentions have: set "
            "--model.num-heads or --model.num-head-channels, or name the preset that it was "
            "trained with by --preset."
        )
    named = architecture(model.architecture)
    shape, expected = _shape(base.unet), _shape(named)
    for name, value in shape.items():
        if value != expected[name]:
            fitting = [known for known, its in ARCHITECTURES.items() if _shape(its) == shape]
            presets = f" ({' or '.join(fitting)} is like it)" if fitting else ""
            raise ConfigError(
                f"the base {base.source} is not of model.architecture {model.architecture}: found "
                f"{name} {value}, expected {expected[name]}{presets}. Name the preset that "
                "it was trained with by --preset, or how many heads its attentions have, which it "
                "does not say, by --model.num-heads or --model.num-head-channels."
            )
    settings: NetworkConfig = {**base.unet, "attention_head_dim": named["attention_head_dim"]}
    if "num_heads" in named:
        settings["num_heads"] = named["num_heads"]
    return {**settings, "sample_size": named["sample_size"]}


def _shape(unet: NetworkConfig) -> dict[str, object]:
    """Return the part of a config that distinguishes the named architectures."""
    return {
        "block_out_channels": unet["block_out_channels"],
        "layers_per_block": unet["layers_per_block"],
        "down_block_types": unet["down_block_types"],
    }


def _first_stage(
    base: PretrainedBase, settings: NetworkConfig, named: str | None
) -> Autoencoder | None:
    """Load the first stage of the UNet's latents, if any: the named one, else its own."""
    stage = base.first_stage if named is None else resolve_path(named)
    if isinstance(stage, PackedFirstStage):
        config = stage.config()
        size = max(image_size(settings)) * downsampling(config["block_out_channels"])
        return stage.load({**config, "sample_size": size})
    if stage is None:
        return None
    document = json_object(stage / "config.json")
    model = load_autoencoder(stage, str(document.get("_class_name")))
    if isinstance(model, VQModel) and "scaling_factor" not in document:
        # diffusers' default came later, and is wrong for CompVis's (huggingface/diffusers 6725)
        logger.info("%s names no scaling_factor: 1.0 is taken", display_path(stage))
        model.register_to_config(scaling_factor=1.0)
    return model.float()


def with_first_stage(config: RunConfig, base: PretrainedBase | None) -> RunConfig:
    """Extract the first stage of a base's checkpoint file into the cache, and set its path.

    Settings that name one, or whose base is no such file, stay as they are.

    Raises:
        ConfigError: The settings are not those that the base was trained with.
        CheckpointError: The first stage is malformed.
    """
    if base is None or config.data.first_stage is not None:
        return config
    if not isinstance(base.first_stage, PackedFirstStage):
        return config
    (file,) = base.files
    cache = resolve_path(config.evaluate.cache_dir)
    folder = cache / "first_stages" / file_digest(fetch(file))[:16]
    if not exists(folder):
        logger.info("extracting the first stage of %s into %s", base.source, display_path(folder))
        first_stage = _first_stage(base, check_compatible(base, config), None)
        assert first_stage is not None
        with atomic_path(folder) as temporary:
            first_stage.save_pretrained(temporary)
    return replace(config, data=replace(config.data, first_stage=display_path(folder)))

"""``tdc_ray.load_base``: a base of any kind, and the settings that follow from it."""

import copy
import logging
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from tdc_ray.cli.api.folder import TemporaryFolder
from tdc_ray.config.compare import CompareConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.run import RunConfig, with_absolute_paths
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline
from tdc_ray.diffusion.samplers import checked_timesteps, make_scheduler, set_timesteps
from tdc_ray.errors import ConfigError
from tdc_ray.models.families import check_class, load_network, save_network
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.structure import network_structure
from tdc_ray.models.text_encoder import TEXT_ENCODER, TOKENIZER
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.pretrained.importer import (
    check_compatible,
    check_weights,
    import_base,
    with_first_stage,
)
from tdc_ray.runs.pretrained.notes import base_notes
from tdc_ray.runs.pretrained.settings import apply_settings, missing_settings, with_base
from tdc_ray.runs.pretrained.sources import PretrainedBase, images_of, resolve_base
from tdc_ray.runs.prune_model import run_config_of

SAVED = ("scheduler", "vqvae", "vae", TEXT_ENCODER, TOKENIZER)
"""What the names of a pipeline's parts begin with that a base needs beside its network."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Base:
    """A base that experts are made of."""

    pretrained: PretrainedBase
    config: RunConfig
    """The settings that experts of it are made by where a call does not say others."""

    temporary: TemporaryFolder | None = None
    """Holds a model that was given in memory."""

    def __repr__(self) -> str:
        data, noise = self.config.data, self.config.diffusion
        process = f"{noise.beta_schedule} betas"
        if noise.is_flow or noise.is_edm:
            process = "rectified flow" if noise.is_flow else "EDM"
        return (
            f"Base({self.pretrained.source!r}, images of {data.shape}, {self.macs} macs, "
            f"{noise.num_train_timesteps} timesteps of {process})"
        )

    @cached_property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler that its experts are sampled with, set to the planned steps."""
        sampler = self.config.sampler
        scheduler = make_scheduler(self.config.diffusion, sampler)
        set_timesteps(scheduler, sampler.num_inference_steps)
        return scheduler

    @property
    def network(self) -> NetworkConfig:
        """The config of its UNet."""
        return check_compatible(self.pretrained, self.config)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass for one image."""
        return network_structure(self.network).macs

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it into a folder that :func:`load_base` and ``tdc-ray run --base`` load."""
        import_base(self.pretrained, self.config, Path(folder))

    def to_pipeline(self) -> ProgressivePipeline:
        """Return a pipeline whose only expert is the base."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            unet = load_network(Path(folder) / "unet")
        return base_pipeline(unet, pipeline_index(self.config))


def load_base(
    source: str | Path | DiffusionPipeline | ModelMixin,
    *,
    scheduler: SchedulerMixin | None = None,
    settings: RunConfig | None = None,
    num_classes: int | None = None,
) -> Base:
    """Load a base that experts are to be made of.

    Args:
        source: A name on the Hugging Face hub, a folder of diffusers (a pipeline or a network), a
            run directory, what ``tdc-ray import`` wrote, ``openai:FILE`` or ``compvis:FILE``; or a
            pipeline or a network in memory (of a class in ``models.families.FAMILIES``), of which
            a copy is taken.
        scheduler: The noise process of a network in memory.
        settings: What the base does not say, and what experts are made by, such as
            ``tdc_ray.preset("cifar10")``. None means those of the run that trained it, or else of
            the preset ``digits``, as on the command line.
        num_classes: Classes that the base is conditioned on, without the null class; None means as
            the base or the settings say.

    Raises:
        ConfigError: It cannot be used here, or does not say its noise process.
        CheckpointError: There is none, or it is malformed.
    """
    temporary = None
    predicts = None if settings is None else settings.diffusion.prediction_type
    if isinstance(source, str | Path):
        if scheduler is not None:
            raise ConfigError(
                "scheduler goes with a network in memory: load it by diffusers, and give both."
            )
        found = resolve_base(str(source), predicts)
    else:
        temporary = TemporaryFolder()
        saved = _save(source, scheduler, temporary.path)
        found = replace(
            resolve_base(str(saved), predicts),
            source=f"{type(source).__name__} in memory",
        )
    if settings is None and (missing := missing_settings(found.settings)):
        raise ConfigError(
            f"{found.source} does not say {', '.join(missing)}: give settings that do, such as "
            "tdc_ray.preset(NAME) of the preset that it was trained with, or the network in "
            "memory and its scheduler."
        )
    trained = None if found.folder is None else run_config_of(found.folder)
    settings = settings or trained or preset("digits")
    base = base_of(found, settings, temporary, num_classes=num_classes)
    for note in base_notes(found, base.config.diffusion, base.config.sampler):
        logger.warning("%s", note)
    return base


def base_of(
    found: PretrainedBase,
    settings: RunConfig,
    temporary: TemporaryFolder | None = None,
    *,
    num_classes: int | None = None,
) -> Base:
    """Return a base with some settings, changed to what it says of its own.

    What trained a base of its own is left out; attentions count for a file, which does not say its
    own.

    Raises:
        ConfigError: The settings cannot be changed to the base's.
        CheckpointError: Its weights are missing, malformed, or no numbers.
    """
    conditioning = settings.conditioning
    if num_classes is not None:
        conditioning = replace(conditioning, num_classes=num_classes)
    config = with_base(settings, found.source, is_file=found.folder is None)
    config = replace(config, conditioning=conditioning, compare=CompareConfig())
    config = apply_settings(found.settings, config, with_data=True)
    if num_classes is not None and config.conditioning.num_classes != num_classes:
        raise ConfigError(
            f"num_classes must be {config.conditioning.num_classes}, as {found.source} says, got "
            f"{num_classes}."
        )
    if isinstance(found.first_stage, Path):
        images = images_of(found.first_stage, found.unet["sample_size"])
        config = replace(config, data=replace(config.data, **images))
    config = with_absolute_paths(with_first_stage(config, found))
    check_compatible(found, config)
    check_weights(found)
    try:
        checked_timesteps(config.diffusion, config.sampler)
    except ConfigError as error:
        raise ConfigError(
            f"{error} The settings of tdc_ray.load_base have the sampler."
        ) from error
    return Base(found, config, temporary)


def _save(
    source: DiffusionPipeline | ModelMixin, scheduler: SchedulerMixin | None, folder: Path
) -> Path:
    """Save what a base needs of a model in memory, as diffusers does; return where it is.

    Raises:
        ConfigError: It cannot be a base, or its noise process is missing or given twice.
    """
    if isinstance(source, ProgressivePipeline):
        raise ConfigError("the base must be one network, got a ProgressivePipeline of experts.")
    if isinstance(source, DiffusionPipeline):
        if scheduler is not None:
            raise ConfigError("scheduler goes with a network alone: a pipeline has its own.")
        parts = source.components
    elif isinstance(source, ModelMixin):
        if scheduler is None:
            raise ConfigError(
                f"scheduler must be given with a {type(source).__name__} in memory: it says the "
                "noise process."
            )
        parts = {"unet": source, "scheduler": scheduler}
    else:
        raise ConfigError(
            "the base must be a path, a name on the hub, or a pipeline or a network of diffusers, "
            f"got a {type(source).__name__}."
        )
    for name in ("unet", "transformer"):
        if (network := parts.get(name)) is not None:
            network = getattr(network, "_orig_mod", network)  # of torch.compile
            kind = type(network).__name__
            check_class(kind, f"the base, a {type(source).__name__} in memory, has")
            save_network(copy.deepcopy(network), folder / name)  # it changes the memory's layout
    for name, part in parts.items():
        if part is not None and name.startswith(SAVED):
            part.save_pretrained(folder / name)
    if not isinstance(source, DiffusionPipeline):
        return folder / "unet"
    source.save_config(folder)
    return folder

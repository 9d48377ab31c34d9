"""Checks before work starts: settings, data, base and limits that do not fit are refused."""

import logging
from pathlib import Path

from tdc_ray.config.conditioning import ConditioningConfig, null_class
from tdc_ray.config.data import BASE_SAMPLES, DataConfig
from tdc_ray.config.image_size import image_size_of, size_text
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import RunConfig, differences, from_json
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.config.validation import errors_together, refuse, require
from tdc_ray.data.batches import LEAST_HELD_OUT, held_out_split
from tdc_ray.data.dataset import ImageDataset
from tdc_ray.data.latents import captions_of
from tdc_ray.data.load import load_dataset
from tdc_ray.data.survey import log_summary
from tdc_ray.diffusion.plan import AFTER_STAGE_1, Plan, plan_groups
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.models.families import check_buildable
from tdc_ray.models.first_stage import check_latents
from tdc_ray.models.network_config import NetworkConfig, class_name, image_size, num_class_embeds
from tdc_ray.models.structure import caption_shapes, reads_text
from tdc_ray.models.text_encoder import check_captions_read, check_text_encoder
from tdc_ray.models.unet2d.architectures import LATENT, base_unet
from tdc_ray.pruning.space import REMEDY, Space, space_of
from tdc_ray.runs.evaluation.features import check_features, check_labels
from tdc_ray.runs.pretrained.importer import check_compatible, check_weights
from tdc_ray.runs.pretrained.sources import PretrainedBase
from tdc_ray.storage.files import exists, read_json
from tdc_ray.storage.object_store import display_path

LEAST_JUDGED = 2
"""Images that losses are compared on, or that scores are against, at least."""

logger = logging.getLogger(__name__)


def check(
    config: RunConfig, pretrained: PretrainedBase | None = None
) -> tuple[NetworkConfig, Space, Plan]:
    """Check before any work that settings, data, base and limits are compatible.

    Args:
        config: The settings.
        pretrained: The base that the run starts from. None means that it trains one.

    Returns:
        The base's network, the space of its pruned models, and the plan.

    Raises:
        ConfigError: Settings disagree with the architecture, or with the pretrained base.
        CheckpointError: The first stage, or the pretrained base, is missing or malformed.
        DataError: The data is missing or malformed.
        LimitError: A group's limit is below the smallest pruned model.
        EvaluationError: The file of Inception is damaged, or is needed and not available.
        UnsupportedModelError: The base has a block of an unknown kind, or cannot halve its images.
    """
    unet = check_network(config, pretrained)
    space, plan = space_and_plan(config, unet)
    if config.prune.objective == "macs":
        check_limits(config.prune, space, plan)
    check_data(config, unet)
    check_labels(config.data, config.evaluate)
    check_features(config.data, config.evaluate)
    return unet, space, plan


@errors_together()
def check_network(config: RunConfig, pretrained: PretrainedBase | None) -> NetworkConfig:
    """Check that the base denoises what the settings of data and noise process say.

    Args:
        config: The settings.
        pretrained: The base that the run starts from. None means that it trains one.

    Raises:
        ConfigError: Settings disagree with the architecture, or with the pretrained base.
        CheckpointError: The first stage, or the pretrained base, is missing or malformed.
    """
    if pretrained is None:
        unet, name = base_unet(config.model, config.conditioning), config.model.name
        is_latent = config.model.network is None and config.model.architecture in LATENT
        if config.model.config is not None:
            check_buildable(unet, name)
    else:
        unet, name = check_compatible(pretrained, config), f"the base {pretrained.source}"
        check_weights(pretrained)
        is_latent = pretrained.first_stage is not None
    data, diffusion = config.data, config.diffusion
    if is_latent and data.first_stage is None:
        raise ConfigError(
            f"{name} denoises latents and needs a first stage: set --data.first-stage to the "
            "folder of a diffusers VQModel, AutoencoderKL or AutoencoderDC, a released one or "
            "what tdc-ray train-autoencoder makes. One that is inside a checkpoint file comes "
            "along after tdc-ray import FILE DIR by --base DIR."
        )
    check_shape(data, unet, name)
    learned_sigma = unet["out_channels"] == 2 * unet["in_channels"]
    if diffusion.learned_sigma != learned_sigma:
        refuse(
            f"diffusion.learned_sigma must be {learned_sigma} for {name}, got "
            f"{diffusion.learned_sigma}."
        )
    return unet


def check_data(config: RunConfig, network: NetworkConfig) -> None:
    """Check that the data can be read, and have the classes that the base takes.

    Raises:
        DataError: The data is missing or malformed.
        ConfigError: Model, labels and guidance are not compatible.
    """
    check_prompts(config, network)
    dataset = load_dataset(config.data)
    log_summary(config.data)
    check_enough_images(config, dataset)
    if reads_text(network):  # guidance leads away from the empty prompt
        return
    check_conditioning(
        config.conditioning,
        guidance_scale=config.sampler.guidance_scale,
        num_class_embeds=num_class_embeds(network),
        num_data_classes=dataset.num_classes,
    )


def check_enough_images(config: RunConfig, dataset: ImageDataset) -> None:
    """Check that there are two images at least for whatever models are compared by.

    Losses have no interval otherwise, and features no covariance.

    Raises:
        ConfigError: There are fewer.
    """
    wanted = config.evaluate.features
    by_loss = wanted == "none" or (wanted == "auto" and dataset.num_classes is None)
    if not by_loss and config.evaluate.reference is None and len(dataset) < LEAST_JUDGED:
        raise ConfigError(
            f"the images that scores are against must be at least {LEAST_JUDGED}, got "
            f"{len(dataset)}. Give more images."
        )
    if not by_loss and config.compare.kind == "none":
        return
    _, held_out = held_out_split(dataset, config.prune.held_out_share, config.seed)
    if len(held_out) < LEAST_HELD_OUT:
        is_too_low = round(0.5 * len(dataset)) >= LEAST_HELD_OUT  # 0.5 is the most
        way_out = "Raise --prune.held-out-share, or give" if is_too_low else "Give"
        raise ConfigError(
            f"prune.held_out_share must hold out at least {LEAST_HELD_OUT} images, on which "
            f"losses are compared, got {config.prune.held_out_share}, which of {len(dataset)} "
            f"holds out {len(held_out)}. {way_out} more images."
        )
    if len(held_out) == LEAST_HELD_OUT:
        logger.info(
            "%d of %d images are held out, the fewest that losses can be compared on",
            len(held_out),
            len(dataset),
        )


def check_prompts(config: RunConfig, network: NetworkConfig) -> None:
    """Check that images come with prompts, or captions, where a network reads them.

    Raises:
        ConfigError: They do not, or a network reads none.
        DataError: They are missing or malformed.
    """
    data, conditioning = config.data, config.conditioning
    check_negative_prompt(config.sampler, is_text_conditional=reads_text(network))
    if not reads_text(network):
        if data.text_encoder is not None:
            raise ConfigError(
                "data.text_encoder goes with a base conditioned on text, got "
                f"{data.text_encoder} with one that is not. Leave it out."
            )
        if conditioning.caption_dropout:
            raise ConfigError(
                "conditioning.caption_dropout must be 0 for a base that is not conditioned on "
                f"text, got {conditioning.caption_dropout}. Leave it out."
            )
        return
    if conditioning.num_classes is not None:
        raise ConfigError(
            "conditioning.num_classes must be None for a base conditioned on text, got "
            f"{conditioning.num_classes}. Leave it out."
        )
    pipeline = check_text_encoder(data.text_encoder)
    check_captions_read(pipeline, caption_shapes(class_name(network), network))
    if data.source != BASE_SAMPLES:
        captions_of(data)


@errors_together()
def check_shape(data: DataConfig, network: NetworkConfig, name: str) -> None:
    """Check that images, or their latents, have the shape that a model takes.

    Raises:
        CheckpointError: The first stage is missing or malformed.
        ConfigError: They have another shape.
    """
    check_latents(data, network, name)
    if data.first_stage is not None:
        return
    size = size_text(image_size_of(image_size(network)))
    for setting, value, expected in (
        ("data.image_size", size_text(data.image_size), size),
        ("data.num_channels", data.num_channels, network["in_channels"]),
    ):
        if value != expected:
            refuse(
                f"{setting} must be {expected} for {name}, got {value}. Set --"
                f"{setting.replace('_', '-')} to that, or use another model."
            )


def space_and_plan(config: RunConfig, network: NetworkConfig) -> tuple[Space, Plan]:
    """Return what can be pruned of a run's base, and the groups of its timesteps.

    Raises:
        ConfigError: Limits are to be measured, for which the base would need a description.
    """
    space = space_of(network, config.prune.space, config.prune.channel_multiple)
    if config.models_all_groups and not space.has_steps:
        raise ConfigError(
            "plan.schedule must not be measured, nor finetune.allocation excess, for a "
            f"{class_name(network)}, which has no description here (models.traced), by which its "
            "loss could be modelled: set plan.schedule to snr and finetune.allocation to equal."
        )
    return space, plan_groups(config.diffusion, config.plan, config.sampler)


def check_limits(prune: PruneConfig, space: Space, plan: Plan) -> None:
    """Check that every group's limit can be met.

    Raises:
        LimitError: A limit is below the cost of the smallest pruned model.
    """
    remedy = "Raise plan.mean_macs_share" if AFTER_STAGE_1 in plan.notes else REMEDY
    if prune.method != "none":
        for group in plan.groups:
            space.check_limit(group.limit(space.cost_base), f"group {group.index}", remedy)


def refuse_other_settings(path: Path, config: RunConfig, kind: str, another: str) -> None:
    """Refuse a folder whose settings, if it has any, differ in what decides results.

    Args:
        path: The settings of the folder.
        config: The requested settings.
        kind: The folder's name in the error.
        another: The alternative, in words.

    Raises:
        StorageError: They differ, or are of another version.
    """
    if not exists(path):
        return
    try:
        before = from_json(read_json(path))
    except ConfigError as error:
        raise StorageError(
            f"{display_path(path)} is of another version: {' '.join(error.args)} Choose another "
            f"{another}."
        ) from error
    if changed := differences(before, config):
        raise StorageError(
            f"{kind} {display_path(path.parent)} has other settings: {'; '.join(changed)}. Use "
            f"the same settings to resume it, or another {another}."
        )


def check_negative_prompt(sampler: SamplerConfig, *, is_text_conditional: bool) -> None:
    """Check that a negative prompt is read by the network, and that guidance leads away from it.

    Raises:
        ConfigError: It is not.
    """
    require(
        "sampler",
        sampler,
        "negative_prompt",
        "None for a base that is not conditioned on text, or with guidance_scale 1, which leads "
        "away from nothing",
        ok=sampler.negative_prompt is None
        or (is_text_conditional and sampler.guidance_scale != 1),
    )


@errors_together()
def check_conditioning(
    config: ConditioningConfig,
    *,
    guidance_scale: float,
    num_class_embeds: int | None,
    num_data_classes: int | None,
) -> None:
    """Check before any work that model, labels and guidance are compatible.

    Args:
        config: The settings.
        guidance_scale: Guidance of sampling; 1 means none.
        num_class_embeds: Classes that the base embeds. None means that it is unconditional.
        num_data_classes: Classes of the data. None means that some images have no label.

    Raises:
        ConfigError: They are not.
    """
    embeds, num_classes = num_class_embeds, config.num_classes
    if embeds is None and num_classes is not None:
        raise ConfigError(
            "conditioning.num_classes must be None for this base, which is unconditional, got "
            f"{num_classes}. Leave it out, or give a base that embeds classes."
        )
    if embeds is not None and num_classes not in (embeds, embeds - 1):
        raise ConfigError(
            f"conditioning.num_classes must be {embeds} for this base, or {embeds - 1} if the "
            f"last of the classes it embeds stands for no class, got {num_classes}. Set "
            "--conditioning.num-classes to what it was trained with."
        )
    if null_class(embeds, num_classes) is None:
        for name, value, none in (
            ("conditioning.label_dropout", config.label_dropout, 0),
            ("sampler.guidance_scale", guidance_scale, 1),
        ):
            if value != none:
                refuse(
                    f"{name} must be {none} for a base without a null class, got {value}. Train "
                    "a base with --conditioning.num-classes and --conditioning.label-dropout "
                    "above 0."
                )
    if num_classes is not None and num_data_classes is None:
        raise ConfigError(
            "data must have a label from 0 on for every image with conditioning.num_classes "
            f"{num_classes}, and has none, or not for all (a warning then says of how many). Set "
            "--data.labels-from-folders, put labels into the npz files, or leave "
            "--conditioning.num-classes out and use an unconditional base."
        )
    if num_classes is not None and num_data_classes is not None and num_data_classes > num_classes:
        raise ConfigError(
            "conditioning.num_classes must be above every label of the data, which go up to "
            f"{num_data_classes - 1}, got {num_classes}."
        )

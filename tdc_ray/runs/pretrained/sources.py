"""The sources of pretrained bases, and the settings that are read before their weights.

A source is a folder (a diffusers pipeline or ``UNet2DModel``, a run directory, an imported base),
a name on the Hugging Face hub, or a checkpoint file of openai/improved-diffusion or of
CompVis/latent-diffusion. Weights are read from safetensors, or by ``torch.load`` without objects.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, VQModel
from huggingface_hub import snapshot_download

from tdc_ray.config.diffusion import EDM_FIELDS, BetaSchedule, PredictionType
from tdc_ray.config.hub import hub_base, not_available
from tdc_ray.config.run import from_json
from tdc_ray.config.sampler import BASE
from tdc_ray.diffusion.samplers import EDM_SCHEDULERS, NEEDED, SETTING_OF, is_flow_class
from tdc_ray.diffusion.schedule import recognise
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models.checkpoints import compvis, openai
from tdc_ray.models.checkpoints.state_dicts import StateDict, load_state_dict
from tdc_ray.models.families import given_config, load_network
from tdc_ray.models.first_stage import downsampling, widths_of
from tdc_ray.models.network_config import (
    FirstStageConfig,
    NetworkConfig,
    class_name,
    image_size,
)
from tdc_ray.models.structure import reads_text
from tdc_ray.models.text_encoder import TEXT_ENCODER
from tdc_ray.models.transformers.table import TRANSFORMERS
from tdc_ray.runs.pretrained.settings import NOISE, SAMPLER, PretrainedSettings, read_settings
from tdc_ray.storage.files import exists, fetch, listing, read_json
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import FIRST_STAGE_DIR, RunDir

BASE_FILE = "base.json"
"""File that makes a folder an imported base."""

FORMAT = 1

SCHEDULER_FILE = "scheduler_config.json"
PREDICTION = "prediction_type"
ZERO_SNR = "rescale_betas_zero_snr"
FLOW: PredictionType = "flow_prediction"
EDM = "sigma_data"

Stages = Mapping[str, Mapping[str, Any]]
"""Settings by stage and name, as a source has them: not checked yet."""


@dataclass(frozen=True, slots=True)
class PackedFirstStage:
    """A first stage inside a checkpoint file."""

    config: Callable[[], FirstStageConfig]
    """Reads its settings, all but ``sample_size``; fails if it is of an unknown kind."""

    load: Callable[[FirstStageConfig], VQModel | AutoencoderKL]
    """Converts it, given all of its settings."""


@dataclass(frozen=True, slots=True)
class PretrainedBase:
    """A base that was found; its weights are not converted yet."""

    source: str
    """As the user names it, on the hub with the commit that was taken."""

    unet: NetworkConfig
    """Its UNet's settings; of a checkpoint file without ``sample_size`` and heads."""

    settings: PretrainedSettings

    weights: str
    """Which weights they are, in words."""

    files: tuple[Path, ...]
    """Files of the weights."""

    load_weights: Callable[[NetworkConfig, bool], StateDict]
    """Loads the UNet's weights, given all of its settings, and whether q, k and v come before
    heads (``use_new_attention_order``)."""

    folder: Path | None = None
    """Folder of the UNet in diffusers' format. None means a checkpoint file."""

    first_stage: Path | PackedFirstStage | None = None
    """The first stage of the latents that the UNet denoises. None means that it denoises
    images."""

    origin: Mapping[str, Any] | None = None
    """``source`` and ``files`` of the import, if the base was imported before."""

    scheduler: Mapping[str, Any] | None = None
    """All settings of its pipeline's scheduler, and ``_class_name``. None means it has none."""

    by_scheduler: str | None = None
    """Its source and the scheduler's file, in words, where that alone says what it predicts."""


def resolve_base(source: str, predicts: PredictionType | None = None) -> PretrainedBase:
    """Find the base that a user names.

    Args:
        source: The base.
        predicts: What the user says that it predicts, which is taken of checkpoint files, as they
            do not say; a base whose scheduler says sample is taken only if the user does, too.

    Raises:
        CheckpointError: There is none, or it is malformed.
        ConfigError: It is of a kind that cannot be used here.
    """
    base = _opened(source)
    if base.folder is None and predicts is not None:
        noise = base.settings.diffusion.model_copy(update={PREDICTION: predicts})
        return replace(base, settings=base.settings.model_copy(update={"diffusion": noise}))
    _check_prediction(base, predicts)
    return base


def _opened(source: str) -> PretrainedBase:
    """Find the base that a user names, whatever it predicts."""
    kind, colon, path = source.partition(":")
    if kind in FILES and colon:
        file = resolve_path(path)
        state = load_state_dict(file)
        try:
            return FILES[kind](source, file, state)
        except CheckpointError as error:
            raise CheckpointError(f"{source} is no such checkpoint: {error}") from error
    folder = resolve_path(source)
    if not exists(folder):
        source, folder = _from_hub(source)
    for opened in FOLDERS:
        if (base := opened(source, folder)) is not None:
            return base
    below = [path.parent.name for path in listing(folder, "*/config.json") if is_unet(path.parent)]
    hint = f" Below it are the UNets {', '.join(below)}: name the folder of one." if below else ""
    raise CheckpointError(
        f"{source} holds no base: it has no model_index.json (a diffusers pipeline), no "
        f"config.json with block_out_channels (a UNet2DModel), no {BASE_FILE} (from tdc-ray "
        "import), and no config.json with base/unet (a run directory whose base is trained)."
        f"{hint}"
    )


def is_unet(folder: Path) -> bool:
    """Whether a folder holds the config of a UNet of diffusers, or of another known denoiser.

    Raises:
        CheckpointError: The config is no JSON object.
    """
    document = json_object(folder / "config.json")
    return "block_out_channels" in document or class_name(document) in TRANSFORMERS


def _check_prediction(base: PretrainedBase, predicts: PredictionType | None) -> None:
    """Check that a user says so, too, of a base that predicts the image by its scheduler.

    Schedulers say so of networks that predict something else, too, and weights do not tell.

    Raises:
        ConfigError: The user does not.
    """
    found = base.settings.diffusion.prediction_type
    if base.by_scheduler is not None and found == "sample" and predicts != "sample":
        raise ConfigError(
            f"{base.by_scheduler} has {PREDICTION} sample: a base that predicts the image is "
            "taken only if you say so, too, by --diffusion.prediction-type sample (or by settings "
            "with it, in Python). Otherwise give another base."
        )


def noise_settings(
    unet: Path, predicts: PredictionType | None = None, *, with_sampler: bool = False
) -> PretrainedSettings:
    """Return the noise process and the first stage of a UNet's folder, and its sampler if asked.

    Args:
        unet: The folder.
        predicts: As for :func:`resolve_base`.
        with_sampler: Whether the sampler is asked for.

    Raises:
        CheckpointError: It is malformed.
        ConfigError: It is of a kind that cannot be used here.
    """
    base = _unet_in_place(display_path(unet), unet)
    if base is None:
        return PretrainedSettings()
    _check_prediction(base, predicts)
    stages = base.settings.model_dump(
        include={
            "diffusion": True,
            "sampler": True if with_sampler else {"clip_sample"},
            "data": {"first_stage", "text_encoder"},
        },
        exclude_unset=True,
    )
    if isinstance(base.first_stage, Path):
        stages["data"] |= images_of(base.first_stage, base.unet["sample_size"])
    return read_settings(base.source, stages)


def _openai(source: str, file: Path, state: StateDict) -> PretrainedBase:
    """Read a checkpoint of improved-diffusion; epsilon is its default, the file does not say."""
    unet = openai.config_from_state_dict(state)
    load = partial(openai.to_diffusers, state)
    settings = _settings(source, unet, stages={"diffusion": {PREDICTION: "epsilon"}})
    return PretrainedBase(source, unet, settings, "as given", (file,), load)


def _compvis(source: str, file: Path, state: StateDict) -> PretrainedBase:
    """Read a checkpoint of latent diffusion.

    It predicts epsilon, which is latent diffusion's default: the file does not say. Its sampler
    does not clip, starts its steps at 1 and ends them at ``betas[0]``.
    """
    parts = compvis.split(state)
    unet = openai.config_from_state_dict(parts.unet)
    first_stage = None
    if parts.first_stage:
        config = partial(compvis.config_from_state_dict, parts)
        first_stage = PackedFirstStage(config, partial(compvis.to_first_stage, parts.first_stage))
    noise = {} if parts.betas is None else _noise_of_betas(source, parts.betas.tolist())
    stages = {
        "diffusion": noise | {PREDICTION: "epsilon", "rescale_timesteps": False},
        "sampler": {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
    }
    return PretrainedBase(
        source,
        unet,
        _settings(source, unet, first_stage, stages),
        "EMA" if parts.is_averaged else "without EMA",
        (file,),
        partial(openai.to_diffusers, parts.unet),
        first_stage=first_stage,
    )


def _imported(source: str, folder: Path, unet: Path | None = None) -> PretrainedBase | None:
    """Read what ``tdc-ray import`` wrote."""
    if not exists(folder / BASE_FILE):
        return None
    document = json_object(folder / BASE_FILE)
    if not {"format", "diffusion"} & document.keys():  # what a run says of its longer base
        return None
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{display_path(folder / BASE_FILE)} has format {document.get('format')}, expected "
            f"{FORMAT}."
        )
    try:
        stages = {
            "diffusion": {
                **{name: document["diffusion"][name] for name in NOISE},
                # which 0.1.0 did not write
                PREDICTION: document["diffusion"].get(PREDICTION, "epsilon"),
                ZERO_SNR: document["diffusion"].get(ZERO_SNR, False),
                **_edm_fields(document["diffusion"]),
            },
            "sampler": {name: document["sampler"][name] for name in SAMPLER}
            | _own_scheduler(document.get("scheduler")),
        }
        if (prompts := document.get("prompts")) is not None:
            stages["sampler"]["guidance_scale"] = prompts["guidance_scale"]
            stages["data"] = {"text_encoder": prompts["text_encoder"]}
        without_betas = stages["diffusion"][PREDICTION] == FLOW or EDM in stages["diffusion"]
        if without_betas and "of_base" in stages["sampler"]:
            stages["sampler"]["scheduler"] = BASE
        first_stage = folder / FIRST_STAGE_DIR if document["first_stage"] else None
        origin = {name: document[name] for name in ("source", "files")}
        weights = document["weights"]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{display_path(folder / BASE_FILE)} is malformed: {error!r}."
        ) from error
    base = _diffusers(source, unet or folder / "unet", stages, weights, first_stage, origin)
    return replace(base, scheduler=document.get("scheduler"))


def _pipeline(source: str, folder: Path, unet: Path | None = None) -> PretrainedBase | None:
    """Read a diffusers pipeline.

    Its parts are in folders of their own, or, as in google/ddpm-cifar10-32, all in one.
    """
    if not exists(folder / "model_index.json"):
        return None
    index = json_object(fetch(folder) / "model_index.json")
    parts = {name for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    kind = index["transformer"][-1] if "transformer" in parts else None
    is_known = kind in (*TRANSFORMERS, "Transformer2DModel")
    denoiser = "transformer" if is_known else "unet"
    if not {denoiser, "scheduler"} <= parts:
        raise ConfigError(
            f"{source} is a {index.get('_class_name')} of {', '.join(sorted(parts))}: only "
            f"pipelines of a unet, {' or '.join(TRANSFORMERS)} and a scheduler (and a vqvae or "
            "vae) can be a base."
        )
    folders = {name: folder / name if (folder / name).is_dir() else folder for name in parts}
    network = unet or folders[denoiser]
    if not exists(network / "config.json"):
        missing = display_path(folder / denoiser)
        raise CheckpointError(
            f"{source} is incomplete: {missing}, which has its network, is missing."
        )
    first_stage = next((folders[name] for name in ("vqvae", "vae") if name in parts), None)
    path = folders["scheduler"] / SCHEDULER_FILE
    if not exists(path):
        raise CheckpointError(
            f"{source} is incomplete: {display_path(path)}, which has its noise process, is "
            "missing."
        )
    kind = index["scheduler"][-1]
    base = _with_scheduler(source, network, path, first_stage, kind)
    return _with_text_encoder(base, folder, index) if reads_text(base.unet) else base


def _with_text_encoder(
    base: PretrainedBase, folder: Path, index: Mapping[str, Any]
) -> PretrainedBase:
    """Add a pipeline's text encoder, and the guidance that it has by default."""
    stages = base.settings.model_dump(exclude_unset=True)
    if exists(folder / TEXT_ENCODER / "config.json"):
        stages["data"]["text_encoder"] = display_path(folder.resolve())
    pipeline: Any = getattr(diffusers, str(index.get("_class_name")), DiffusionPipeline)
    if scale := inspect.signature(pipeline.__call__).parameters.get("guidance_scale"):
        stages["sampler"]["guidance_scale"] = scale.default
    return replace(base, settings=read_settings(base.source, stages))


def _with_scheduler(
    source: str,
    unet: Path,
    path: Path,
    first_stage: Path | None = None,
    class_name: str | None = None,
) -> PretrainedBase:
    """Read a UNet whose noise process is that of a scheduler's file."""
    named = f"{source} (by {display_path(path)})"
    scheduler = _scheduler_config(named, {"_class_name": class_name, **json_object(path)})
    stages = _scheduler_settings(named, scheduler)
    base = _diffusers(source, unet, stages, "as given", first_stage)
    is_learned = scheduler.get("variance_type") == "learned_range"
    if is_learned and not base.settings.diffusion.learned_sigma:
        raise ConfigError(
            f"{named} has variance_type learned_range in its scheduler, and its unet outputs "
            f"{base.unet['out_channels']} channels: expected {2 * base.unet['in_channels']}."
        )
    return replace(base, scheduler=scheduler, by_scheduler=named)


def _run(source: str, folder: Path, unet: Path | None = None) -> PretrainedBase | None:
    """Read the base of a run directory, trained or imported."""
    run_dir = RunDir(folder)
    if not (exists(run_dir.config) and exists(run_dir.base_result)):
        return None
    if (imported := _imported(source, run_dir.base, unet)) is not None:
        return imported
    config = from_json(read_json(run_dir.config))
    noise = (*NOISE, PREDICTION, ZERO_SNR)
    stages = {
        "diffusion": {name: getattr(config.diffusion, name) for name in noise}
        | _edm_fields(asdict(config.diffusion)),
        "sampler": {name: getattr(config.sampler, name) for name in SAMPLER},
        "conditioning": {"num_classes": config.conditioning.num_classes},
    }
    if config.data.text_encoder is not None:
        stages["data"] = {"text_encoder": config.data.text_encoder}
        stages["sampler"]["guidance_scale"] = config.sampler.guidance_scale
    is_latent = config.data.first_stage is not None
    first_stage = run_dir.experts / FIRST_STAGE_DIR if is_latent else None
    return _diffusers(source, unet or run_dir.base_unet, stages, "EMA", first_stage)


def _unet(source: str, folder: Path) -> PretrainedBase | None:
    """Read a ``UNet2DModel``: this one, whatever others are beside it."""
    if not is_unet(folder):
        return None
    return _unet_in_place(source, folder) or _diffusers(source, folder, {}, "as given")


def _unet_in_place(source: str, folder: Path) -> PretrainedBase | None:
    """Read a UNet with the noise process of the pipeline, the import or the run that it lies in.

    That is one folder up, or two, as what training scripts of diffusers leave in
    ``checkpoint-500/unet``, of a link first and then of what it leads to. None means that it is
    alone.
    """
    folder = folder.absolute()
    for place in (p for end in (folder, folder.resolve()) for p in (end, *end.parents[:2])):
        for opened in (_imported, _pipeline, _run):
            if (base := opened(source, place, folder)) is not None:
                return base
        for path in (place / SCHEDULER_FILE, place / "scheduler" / SCHEDULER_FILE):
            if exists(path):
                return _with_scheduler(source, folder, path)
    return None


FILES = {"openai": _openai, "compvis": _compvis}
"""Functions that read a checkpoint file, by the prefix before its colon."""

FOLDERS = (_imported, _pipeline, _run, _unet)
"""Functions that read a folder, tried in this order; each returns None for another kind."""


def _diffusers(
    source: str,
    folder: Path,
    stages: Stages,
    weights: str,
    first_stage: Path | None = None,
    origin: Mapping[str, Any] | None = None,
) -> PretrainedBase:
    """Read a UNet in diffusers' format, with its known settings."""
    unet = given_config(folder)
    unet.pop("dropout", None)  # it is a setting of training, not of the network
    settings = _settings(source, unet, first_stage, stages)
    folders = [folder] if first_stage is None else [folder, first_stage]
    files = tuple(file for place in folders for file in listing(place, "*.safetensors"))

    def load(_settings: NetworkConfig, _new_order: bool) -> StateDict:  # noqa: FBT001
        weights: StateDict = load_network(folder).float().state_dict()
        return weights

    return PretrainedBase(
        source, unet, settings, weights, files, load, folder, first_stage, origin
    )


def _settings(
    source: str,
    unet: NetworkConfig,
    first_stage: Path | PackedFirstStage | None = None,
    stages: Stages | None = None,
) -> PretrainedSettings:
    """Add the settings that follow from a UNet's channels to those of its source.

    Raises:
        ConfigError: It is no denoiser of images or latents, or a setting has a wrong type.
    """
    inputs, outputs = unet["in_channels"], unet["out_channels"]
    if outputs not in (inputs, 2 * inputs):
        raise ConfigError(
            f"{source} must predict as many channels as it takes, or twice as many with a learned "
            f"variance: found {inputs} in and {outputs} out."
        )
    known = {stage: dict(values) for stage, values in (stages or {}).items()}
    known.setdefault("diffusion", {})["learned_sigma"] = outputs == 2 * inputs
    data = known.setdefault("data", {})
    if first_stage is not None:
        known.setdefault("sampler", {})["clip_sample"] = False  # latents lie outside [-1, 1]
        if outputs == 2 * inputs:
            known["diffusion"]["vlb_weight"] = 0.0  # L_vlb is of pixels
        if isinstance(first_stage, Path):
            data["first_stage"] = display_path(first_stage.resolve())
        return read_settings(source, known)
    if inputs not in (1, 3):
        raise ConfigError(
            f"{source} must denoise images of 1 or 3 channels, got {inputs}: if these are "
            "latents, give the whole pipeline, which has the first stage."
        )
    data["num_channels"] = inputs
    if unet.get("sample_size") is not None:
        data["image_size"] = unet["sample_size"]
    return read_settings(source, known)


def _scheduler_config(source: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a diffusers scheduler's settings by its class's defaults; check its class."""
    name = document["_class_name"]
    kind: Any = getattr(diffusers, str(name), None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ConfigError(f"{source} has a {name}, which is no scheduler of diffusers.")
    try:
        return {**kind.from_config(dict(document)).config, "_class_name": str(name)}
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{source} has a {name} that cannot be used: {error}") from error


def _scheduler_settings(source: str, config: Mapping[str, Any]) -> Stages:
    """Read the settings of a diffusers scheduler that come along with a base.

    Raises:
        ConfigError: It has another noise process, or predicts something else, than is known here.
    """
    name = config["_class_name"]
    for setting, needed in NEEDED.items():
        if config.get(setting, needed) != needed:
            raise ConfigError(
                f"{source} has {setting} {config[setting]} in its {name}: only {needed} is "
                "supported. Give another base."
            )
    if is_flow_class(getattr(diffusers, name)):
        return _flow_settings(config)
    if name in EDM_SCHEDULERS:
        return _edm_settings(config)
    if config.get("variance_type") == "learned":
        raise ConfigError(
            f"{source} has variance_type learned: only learned_range is supported. Give another "
            "base."
        )
    predicts = config.get(PREDICTION, "epsilon")
    if predicts not in get_args(PredictionType):
        raise ConfigError(
            f"{source} has {PREDICTION} {predicts} in its {name}: only "
            f"{', '.join(get_args(PredictionType))} are supported. Give another base."
        )
    mixes = config.get("use_flow_sigmas", False)
    if mixes != (predicts == FLOW):
        raise ConfigError(
            f"{source} has use_flow_sigmas {mixes} and {PREDICTION} {predicts} in its {name}: "
            f"rectified flow has True and {FLOW}, others neither. Give another base."
        )
    if predicts == FLOW:
        return _flow_settings(config)
    known = get_args(BetaSchedule)
    betas, schedule = config.get("trained_betas"), config.get("beta_schedule")
    if betas is not None:
        noise = _noise_of_betas(source, betas)
    elif schedule in known:
        noise = {setting: config[setting] for setting in NOISE if setting in config}
    else:
        raise ConfigError(
            f"{source} has beta_schedule {schedule} in its {name}: only {', '.join(known)} are "
            "supported."
        )
    return {
        # no pipeline of diffusers rescales
        "diffusion": noise
        | {
            PREDICTION: predicts,
            ZERO_SNR: config.get(ZERO_SNR, False),
            "rescale_timesteps": False,
        },
        "sampler": {setting: config[setting] for setting in SAMPLER if setting in config}
        | _own_scheduler(config),
    }


def _flow_settings(config: Mapping[str, Any]) -> Stages:
    """Read the settings of a scheduler of rectified flow, which alone can sample its base."""
    return {
        "diffusion": {
            "num_train_timesteps": config["num_train_timesteps"],
            PREDICTION: FLOW,
            "rescale_timesteps": False,
        },
        "sampler": {"scheduler": BASE} | _own_scheduler(config),
    }


def _edm_settings(config: Mapping[str, Any]) -> Stages:
    """Read the settings of one of EDM's schedulers, which alone can sample its base."""
    return {
        "diffusion": {
            "num_train_timesteps": config["num_train_timesteps"],
            PREDICTION: config[PREDICTION],
            "rescale_timesteps": False,
            **_edm_fields(config),
        },
        "sampler": {"scheduler": BASE} | _own_scheduler(config),
    }


def _edm_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of EDM's noise process, if it is that."""
    if config.get(EDM) is None:
        return {}
    return {name: config[name] for name in EDM_FIELDS}


def _own_scheduler(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a scheduler's settings say beyond its noise process and its class's defaults."""
    if config is None:
        return {}
    known = {*SETTING_OF, *config.get("_use_default_values", ())} - {"timestep_spacing"}
    kept = {name: value for name, value in config.items() if name not in known and name[0] != "_"}
    return {"of_base": {"_class_name": config["_class_name"], **kept}}


def _noise_of_betas(source: str, betas: object) -> dict[str, Any]:
    """Recognise the schedule of betas.

    Raises:
        ConfigError: They are of no known schedule.
    """
    if (
        not isinstance(betas, list)
        or not betas
        or not all(isinstance(beta, float | int) for beta in betas)
    ):
        raise ConfigError(f"{source} has betas of its own that are no list of numbers.")
    schedule = recognise(np.asarray(betas, dtype=np.float64))
    if schedule is None:
        raise ConfigError(
            f"{source} has betas of its own, {betas[0]} to {betas[-1]} in {len(betas)} steps, "
            f"which are of no schedule known here: {', '.join(get_args(BetaSchedule))}."
        )
    return dict(zip(NOISE, (len(betas), *schedule), strict=False))


def images_of(first_stage: Path, size: int | tuple[int, int] | None) -> dict[str, Any]:
    """Return the images of latents of a size; nothing if a config lacks it: refused later."""
    config = json_object(first_stage / "config.json")
    channels, levels = config.get("in_channels"), widths_of(config)
    if size is None or not isinstance(channels, int) or not isinstance(levels, list):
        return {}
    factor, (height, width) = downsampling(levels), image_size({"sample_size": size})
    return {"num_channels": channels, "image_size": (factor * height, factor * width)}


def _from_hub(name: str) -> tuple[str, Path]:
    """Download a repository's settings and safetensors, or find them in the hub's cache.

    Variants are left out, but for networks that have their weights in variants alone.

    Returns:
        The name with the commit that was taken, and the folder.
    """
    hub = hub_base(name)
    if hub is None:
        raise CheckpointError(f"{name} does not exist, and is no name on the hub (OWNER/NAME).")
    try:
        left_out = ["*.fp16*", "*non_ema*", "safety_checker/*"]
        downloaded = Path(
            snapshot_download(
                hub.repository,
                revision=hub.revision,
                allow_patterns=["*.json", "tokenizer*/*"],
                ignore_patterns=left_out,
            )
        )
        commit = downloaded.name
        # Beside a pipeline's folders the same weights may lie in one file, of many GB.
        weights = "*/*.safetensors" if exists(downloaded / "model_index.json") else "*.safetensors"
        snapshot_download(
            hub.repository, revision=commit, allow_patterns=[weights], ignore_patterns=left_out
        )
        networks = [path.parent for path in downloaded.rglob("config.json")]
        lacking = [
            (network.relative_to(downloaded) / "*model*").as_posix()  # of a text encoder, too
            for network in networks
            if not listing(network, "*.safetensors")
        ]
        if lacking:
            patterns = [lack + suffix for lack in lacking for suffix in (".json", ".safetensors")]
            snapshot_download(hub.repository, revision=commit, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        raise CheckpointError(not_available(name, "model", error)) from error
    return str(hub.at(commit)), downloaded


def json_object(path: Path) -> dict[str, Any]:
    """Load a JSON object; a file that is missing is an empty one."""
    document = read_json(path) if exists(path) else {}
    if not isinstance(document, dict):
        raise CheckpointError(f"{display_path(path)} must hold a JSON object.")
    return document

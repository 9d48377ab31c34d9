"""Where a given base can come from, and what it tells of how it was trained.

A source is a folder (a diffusers pipeline or ``UNet2DModel``, a run directory, an imported base),
a name on the Hugging Face hub, or a checkpoint file of openai/improved-diffusion or of
CompVis/latent-diffusion. Weights are read from safetensors, or by ``torch.load`` without objects.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
from diffusers import SchedulerMixin
from huggingface_hub import snapshot_download

from tdc_ray.config.diffusion import BetaSchedule
from tdc_ray.config.model import FILE_KINDS
from tdc_ray.config.run import from_json
from tdc_ray.diffusion.schedule import recognise
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models.checkpoints import compvis, openai
from tdc_ray.models.checkpoints.state_dicts import StateDict, load_state_dict
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.unet import given_unet_config
from tdc_ray.storage.files import exists, fetch, listing, read_json
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir

BASE_FILE = "base.json"
"""Makes a folder an imported base."""

FORMAT = 1
FIRST_STAGE_DIR = "first_stage"

NOISE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_timesteps")
"""What of ``DiffusionConfig`` a network cannot be used without."""

SAMPLER = ("steps_offset", "clip_sample", "set_alpha_to_one")
"""What of ``SamplerConfig`` goes with a network; a user may sample otherwise."""

_NEEDED = {
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "clip_sample_range": 1.0,
}
"""Settings of a diffusers scheduler that have one supported value."""


@dataclass(frozen=True, slots=True)
class PretrainedBase:
    """A base that was found, with what it tells; its weights are not loaded yet."""

    source: str
    """As the user names it."""

    unet: NetworkConfig
    """Its UNet's settings; of a checkpoint file without ``sample_size`` and heads."""

    told: Mapping[str, Any]
    """Settings by their dotted names, such as ``diffusion.num_train_timesteps``."""

    weights: str
    """Which weights they are, in words."""

    files: tuple[Path, ...]
    """That hold the weights."""

    folder: Path | None = None
    """Of the UNet, where it is in diffusers' format; None: ``state`` holds it."""

    state: StateDict = field(default_factory=dict)
    """Of a checkpoint file: the UNet's tensors, under improved-diffusion's names."""

    first_stage: Path | compvis.Checkpoint | None = None
    """What encodes images to the latents that the UNet denoises; None: it denoises images."""

    origin: Mapping[str, Any] | None = None
    """Of a base that was imported before: ``source`` and ``files`` of that import."""


def resolve_base(source: str) -> PretrainedBase:
    """Find what a user names.

    Raises:
        CheckpointError: There is none, or it is malformed.
        ConfigError: It is of a kind that cannot be used here.
    """
    kind, colon, path = source.partition(":")
    if kind in FILE_KINDS and colon:
        file = Path(path).expanduser()
        state = load_state_dict(file)
        try:
            return (_openai if kind == "openai" else _compvis)(source, file, state)
        except CheckpointError as error:
            raise CheckpointError(f"{source} is no such checkpoint: {error}") from error
    folder = resolve_path(source).expanduser()
    return _in_folder(source, folder if exists(folder) else _from_hub(source))


def _openai(source: str, file: Path, state: StateDict) -> PretrainedBase:
    """The file tells nothing of its noise process."""
    unet = openai.config_from_state_dict(state)
    told = _told_by_unet(source, unet, is_latent=False)
    return PretrainedBase(source, unet, told, "as given", (file,), state=state)


def _compvis(source: str, file: Path, state: StateDict) -> PretrainedBase:
    """Latent diffusion clips nothing, starts its steps at 1 and ends them at ``betas[0]``."""
    parts = compvis.split(state)
    unet, is_latent = openai.config_from_state_dict(parts.unet), bool(parts.first_stage)
    told = _told_by_unet(source, unet, is_latent=is_latent) | {
        "diffusion.rescale_timesteps": False,
        "sampler.steps_offset": 1,
        "sampler.clip_sample": False,
        "sampler.set_alpha_to_one": False,
    }
    if parts.betas is not None:
        told |= _told_by_betas(source, parts.betas.tolist())
    weights = "EMA" if parts.is_averaged else "without EMA"
    first_stage = parts if is_latent else None
    return PretrainedBase(
        source, unet, told, weights, (file,), state=parts.unet, first_stage=first_stage
    )


def _in_folder(source: str, folder: Path) -> PretrainedBase:
    if exists(folder / BASE_FILE):
        return _imported(source, folder)
    if exists(folder / "model_index.json"):
        return _pipeline(source, folder)
    run_dir = RunDir(folder)
    if exists(run_dir.config) and exists(run_dir.base_result):
        return _run(source, run_dir)
    if "block_out_channels" in json_object(folder / "config.json"):
        if exists(folder.parent / "model_index.json"):
            return _pipeline(source, folder.parent)
        return _diffusers(source, folder, {}, "as given")
    raise CheckpointError(
        f"{source} holds no base: it has no model_index.json (a diffusers pipeline), no "
        f"config.json with block_out_channels (a UNet2DModel), no {BASE_FILE} (from tdc-ray "
        "import), and no config.json with base/unet (a run directory whose base is trained)."
    )


def _imported(source: str, folder: Path) -> PretrainedBase:
    document = json_object(folder / BASE_FILE)
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{display_path(folder / BASE_FILE)} has format {document.get('format')}, expected "
            f"{FORMAT}."
        )
    try:
        told = {f"diffusion.{name}": document["diffusion"][name] for name in NOISE}
        told |= {f"sampler.{name}": document["sampler"][name] for name in SAMPLER}
        stage = folder / FIRST_STAGE_DIR if document["first_stage"] else None
        origin = {name: document[name] for name in ("source", "files")}
        weights = document["weights"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{display_path(folder / BASE_FILE)} is malformed: {error!r}."
        ) from error
    return _diffusers(source, folder / "unet", told, weights, stage, origin)


def _run(source: str, run_dir: RunDir) -> PretrainedBase:
    if exists(run_dir.base / BASE_FILE):
        return _imported(source, run_dir.base)
    config = from_json(read_json(run_dir.config))
    told = {f"diffusion.{name}": getattr(config.diffusion, name) for name in NOISE}
    told |= {f"sampler.{name}": getattr(config.sampler, name) for name in SAMPLER}
    told["conditioning.num_classes"] = config.conditioning.num_classes
    is_latent = config.data.first_stage is not None
    stage = run_dir.experts / FIRST_STAGE_DIR if is_latent else None
    return _diffusers(source, run_dir.base_unet, told, "EMA", stage)


def _pipeline(source: str, folder: Path) -> PretrainedBase:
    """Its parts lie in folders of their own, or, as in google/ddpm-cifar10-32, all in one."""
    index = json_object(fetch(folder) / "model_index.json")
    parts = {name for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    if not {"unet", "scheduler"} <= parts:
        raise ConfigError(
            f"{source} is a {index.get('_class_name')} of {', '.join(sorted(parts))}: only "
            "pipelines of a unet and a scheduler (and a vqvae or vae) can be a base."
        )
    where = {name: folder / name if (folder / name).is_dir() else folder for name in parts}
    stages = [where[name] for name in ("vqvae", "vae") if name in parts]
    stage = stages[0] if stages else None
    path = where["scheduler"] / "scheduler_config.json"
    if not exists(path):
        raise CheckpointError(
            f"{source} is incomplete: {display_path(path)}, which tells its noise process, is "
            "missing."
        )
    scheduler = {"_class_name": index["scheduler"][-1], **json_object(path)}
    told = _told_by_scheduler(source, scheduler)
    base = _diffusers(source, where["unet"], told, "as given", stage)
    is_learned = scheduler.get("variance_type") == "learned_range"
    if is_learned and not base.told["diffusion.learned_sigma"]:
        raise ConfigError(
            f"{source} has variance_type learned_range in its scheduler, and its unet gives out "
            f"{base.unet['out_channels']} channels: expected {2 * base.unet['in_channels']}."
        )
    return base


def _diffusers(
    source: str,
    folder: Path,
    told: Mapping[str, Any],
    weights: str,
    first_stage: Path | None = None,
    origin: Mapping[str, Any] | None = None,
) -> PretrainedBase:
    """A UNet in diffusers' format, with what is known of it."""
    unet = {k: value for k, value in given_unet_config(folder).items() if k != "dropout"}
    by_unet = _told_by_unet(source, unet, is_latent=first_stage is not None)
    if first_stage is not None:
        by_unet |= {
            "data.first_stage": display_path(first_stage.resolve()),
            "sampler.clip_sample": False,  # latents lie outside [-1, 1]
        }
    folders = [folder] if first_stage is None else [folder, first_stage]
    files = tuple(file for place in folders for file in listing(place, "*.safetensors"))
    return PretrainedBase(
        source,
        unet,
        {**told, **by_unet},
        weights,
        files,
        folder=folder,
        first_stage=first_stage,
        origin=origin,
    )


def _told_by_unet(source: str, unet: NetworkConfig, *, is_latent: bool) -> dict[str, Any]:
    inputs, outputs = unet["in_channels"], unet["out_channels"]
    if not isinstance(inputs, int) or outputs not in (inputs, 2 * inputs):
        raise ConfigError(
            f"{source} must predict as many channels as it takes, or twice as many with a learned "
            f"variance: found {inputs} in and {outputs} out."
        )
    told: dict[str, Any] = {"diffusion.learned_sigma": outputs == 2 * inputs}
    if is_latent:
        return told
    if inputs not in (1, 3):
        raise ConfigError(
            f"{source} must denoise images of 1 or 3 channels, got {inputs}: if these are "
            "latents, give the whole pipeline, which has the first stage."
        )
    told["data.num_channels"] = inputs
    if unet.get("sample_size") is not None:
        told["data.image_size"] = unet["sample_size"]
    return told


def _told_by_scheduler(source: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Read a diffusers scheduler's settings; its class knows those that are not written down."""
    name = document["_class_name"]
    kind: Any = getattr(diffusers, str(name), None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ConfigError(f"{source} has a {name}, which is no scheduler of diffusers.")
    try:
        config = dict(kind.from_config(dict(document)).config)
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{source} has a {name} that cannot be used: {error}") from error
    for setting, needed in _NEEDED.items():
        if config.get(setting, needed) != needed:
            raise ConfigError(
                f"{source} has {setting} {config[setting]} in its {name}: only {needed} is "
                "supported."
            )
    if config.get("variance_type") == "learned":
        raise ConfigError(f"{source} has variance_type learned: only learned_range is supported.")
    known = get_args(BetaSchedule)
    betas, schedule = config.get("trained_betas"), config.get("beta_schedule")
    if betas is not None:
        told = _told_by_betas(source, betas)
    elif schedule in known:
        told = {f"diffusion.{s}": config[s] for s in ("beta_schedule", "beta_start", "beta_end")}
        told["diffusion.num_train_timesteps"] = config["num_train_timesteps"]
    else:
        raise ConfigError(
            f"{source} has beta_schedule {schedule} in its {name}: only {', '.join(known)} are "
            "supported."
        )
    told["diffusion.rescale_timesteps"] = False  # no pipeline of diffusers does
    return told | {f"sampler.{s}": config[s] for s in SAMPLER if s in config}


def _told_by_betas(source: str, betas: object) -> dict[str, Any]:
    if (
        not isinstance(betas, list)
        or not betas
        or not all(isinstance(b, float | int) for b in betas)
    ):
        raise ConfigError(f"{source} has betas of its own that are no list of numbers.")
    found = recognise(np.asarray(betas, dtype=np.float64))
    if found is None:
        raise ConfigError(
            f"{source} has betas of its own, {betas[0]} to {betas[-1]} in {len(betas)} steps, "
            f"which are of no schedule known here: {', '.join(get_args(BetaSchedule))}."
        )
    values = dict(zip(("beta_schedule", "beta_start", "beta_end"), found, strict=True))
    values["num_train_timesteps"] = len(betas)
    return {f"diffusion.{name}": value for name, value in values.items()}


def _from_hub(name: str) -> Path:
    """Fetch a repository's settings and safetensors, or find them in the hub's cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name} does not exist, and is no name on the hub (owner/name).")
    try:
        fetched = snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=["*.fp16.*", "*non_ema*"],
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor to be had from the Hugging Face hub: "
            f"{str(error).splitlines()[0].rstrip('.')}. Download it where there is a network, and "
            "give its folder."
        ) from error
    return Path(fetched)


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is missing is an empty one."""
    document = read_json(path) if exists(path) else {}
    if not isinstance(document, dict):
        raise CheckpointError(f"{display_path(path)} must hold a JSON object.")
    return document

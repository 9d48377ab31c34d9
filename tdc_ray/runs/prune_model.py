"""Prunes any saved denoiser to a limit, in this process: ``tdc-ray prune``."""

import logging
import time
from dataclasses import replace
from pathlib import Path

from tdc_ray.config.data import BASE_SAMPLES, DataConfig
from tdc_ray.config.run import RunConfig, digest, from_json, with_absolute_paths, with_data
from tdc_ray.data.detect import data_config
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.data.load import load_dataset, with_commit
from tdc_ray.data.survey import log_summary
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.execution.chain import run_chain
from tdc_ray.execution.device import allow_tf32, worker_device
from tdc_ray.execution.events import listening
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import given_config
from tdc_ray.models.finite import check_finite
from tdc_ray.models.network_config import NetworkConfig, image_size, num_class_embeds
from tdc_ray.models.saved_expert import save_expert_into
from tdc_ray.models.timing import device_name, time_passes
from tdc_ray.models.transformers.table import TRANSFORMERS
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.latency import MIN_REPEATS, MIN_SECONDS, timed_space
from tdc_ray.pruning.loaded_base import load_base, prune_and_refit
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.proxies.language_model import check_proxy
from tdc_ray.pruning.result import contribution_notes, schemes_by_source
from tdc_ray.pruning.search import search_submodel
from tdc_ray.pruning.space import Scheme, Space, space_of
from tdc_ray.runs.events import SinksFor, no_sinks
from tdc_ray.runs.preflight import check_prompts, check_shape
from tdc_ray.runs.pretrained.sources import is_unet
from tdc_ray.runs.stages.base_samples import draw_base_samples, drawing_macs, with_base_samples
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.runs.stages.precision import resolve_auto_precision
from tdc_ray.storage.digest import json_digest
from tdc_ray.storage.files import exists, listing, read_json, write_json
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import display_path, is_remote, resolve_path, version
from tdc_ray.storage.run_dir import RunDir

REPORT_FILE = "report.json"
SEARCH_DIR = "search"

logger = logging.getLogger(__name__)


def unet_dir(path: Path) -> Path:
    """Return the folder of a UNet, given that, a pipeline's, or a run directory.

    Raises:
        CheckpointError: There is none.
    """
    path = resolve_path(path)
    for folder in (path, path / "unet", path / "transformer", path / "base" / "unet"):
        if is_unet(folder):
            return folder if is_remote(folder) else folder.absolute()  # links stay
    raise CheckpointError(
        f"{display_path(path)} {'holds no UNet2DModel' if exists(path) else 'does not exist'}: "
        "neither it nor its unet or base/unet has a config.json with block_out_channels, nor is "
        f"it or its transformer a {' or '.join(TRANSFORMERS)}. (tdc-ray "
        "import BASE DIR makes such a folder of a model on the hub and of a file of openai: or "
        "compvis:. A model that was pruned before cannot be pruned again.)"
    )


def check_out(out: Path, unet: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        ConfigError: It is a file, or a folder with other content or of another model.
    """
    is_file = exists(out) and not is_remote(out) and not out.is_dir()
    files = [path for path in listing(out, "*") if not path.name.startswith(".")]
    if is_file or (files and not exists(out / SEARCH_DIR)):
        raise ConfigError(
            f"--out must be a new folder, or one that tdc-ray prune wrote before, got "
            f"{display_path(out)}, which is something else. Name another."
        )
    before = read_json(out / REPORT_FILE) if exists(out / REPORT_FILE) else {}
    source = _real_path(unet)
    # Reports of older versions do not say of which model they are.
    if before.get("model", source) != source:
        raise ConfigError(
            f"--out {display_path(out)} holds what was pruned of {before['model']} and must be of "
            f"{source} to be written anew. Name another folder, or delete this one."
        )


def _real_path(unet: Path) -> str:
    return display_path(resolve_path(unet).resolve())


def run_config_of(unet: Path) -> RunConfig | None:
    """Return the settings of the run that trained a UNet, or None if it is in no run directory.

    Raises:
        ConfigError: They are of another version.
    """
    path = unet.parent.parent / "config.json"
    if unet.name != "unet" or unet.parent.name != "base" or not exists(path):
        return None
    return from_json(read_json(path))


def prune_model(
    unet: Path,
    config: RunConfig,
    group: TimestepGroup,
    out: Path,
    milliseconds: float | None = None,
    sinks_for: SinksFor = no_sinks,
) -> dict[str, object]:
    """Search, prune and refit; write the pruned model and its report.

    The same call resumes an interrupted one.

    Args:
        unet: The folder of the UNet.
        config: Data, noise process and how to prune.
        group: The timesteps, and the limit unless time is limited.
        out: Folder of the model (``models.saved_expert.load_expert`` loads it) and
            ``report.json``; measurements of the search are in its folder ``search``.
        milliseconds: Most time of a forward pass of ``prune.latency_batch_size`` images on this
            device; it needs the objective latency, and no other.
        sinks_for: Creates the sinks of the search's events.

    Returns:
        The report.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
    """
    out, config, network = resolve_path(out), with_absolute_paths(config), given_config(unet)
    allow_tf32(allowed=config.compute.tf32)
    _check_settings(config, milliseconds)
    check_out(out, unet)
    config = with_base_samples(replace(config, data=with_commit(config.data)), unet)
    space = space_of(network, config.prune.space, config.prune.channel_multiple)
    _check_data(config, network)
    check_finite([unet])
    if milliseconds is None:
        space.check_limit(group.limit(space.cost_base), "the model", "Raise --macs")
    with hold_lease(out):
        table = _latency_name(config, network)
        limit_name = group.limit_share if milliseconds is None else f"{milliseconds} ms, {table}"
        search_dir = out / SEARCH_DIR / _search_name(unet, config, group, limit_name)
        run_dir = RunDir(search_dir.resolve(), unet)
        with listening(sinks_for(run_dir)) as events:
            run_chain(draw_base_samples(config, unet), events)
            precision = resolve_auto_precision(run_dir, config, network, ["prune"])
            config = run_chain(precision, events)
            if milliseconds is not None:
                path = (out / SEARCH_DIR / table).resolve()
                chain = timed_space(path, network, space, config.prune.latency_batch_size)
                space = run_chain(chain, events)
                limit = round(1e6 * milliseconds)
                space.check_limit(limit, "the model", "Raise --milliseconds")
                if limit >= space.cost_base:
                    logger.warning(
                        "--milliseconds %g is no less than the %.4g ms that the model takes: "
                        "nothing need be pruned",
                        milliseconds,
                        space.cost_base / 1e6,
                    )
                group = replace(group, limit_share=min(1.0, limit / space.cost_base))
            data = training_data(config.data, config.evaluate.cache_dir)
            run_chain(prepare_latents(data), events)
            search = GroupSearch(pruning_context(run_dir, config, data), space, group)
            result = run_chain(search_submodel(search, MemoryBank(run_dir.memory)), events)
        logger.info("writing the model")
        writing = time.perf_counter()
        base = load_base(search.context, group)
        pruned = prune_and_refit(base, result.kept).network
        save_expert_into(out, pruned, network, result.kept)
        drawing = drawing_macs(config, space.macs_base)
        report: dict[str, object] = {
            "model": _real_path(unet),
            "macs_base": space.macs_base,
            "macs": space.macs(result.widths),
            "macs_limit": search.limit if milliseconds is None else space.macs_base,
            "num_params_base": space.num_params_base,
            "num_params": space.num_params(result.widths),
            "loss_base": result.loss_base,
            "loss_cut": result.loss_cut,
            "loss_refit": result.loss_refit,
            "method": config.prune.method,
            "source": "base" if result.entry is None else result.entry.source,
            "refit": config.prune.refit,
            "space": config.prune.space,
            "objective": config.prune.objective,
            "timesteps": [group.first, group.last],
            "widths": dict(result.widths),
            "search_macs": result.cost.macs + drawing,
            "drawing_macs": drawing,
            "prompt_tokens": result.cost.prompt_tokens,
            "completion_tokens": result.cost.completion_tokens,
            "proxy_cost": result.cost.proxy_cost,
            "schemes": schemes_by_source([result]),
            "notes": [
                *(contribution_notes([result]) if config.prune.method == "llm" else ()),
                *result.cost.notes,
            ],
            "proxy_seconds": result.cost.proxy_seconds,
            "search_seconds": result.cost.seconds,
            "seconds": result.cost.seconds
            + result.cost.proxy_seconds
            + (time.perf_counter() - writing),
        }
        if milliseconds is not None:
            report["time"] = _time(
                config, space, result.widths, milliseconds, base.network, pruned
            )
        write_json(out / REPORT_FILE, report)
    return report


def _check_settings(config: RunConfig, milliseconds: float | None) -> None:
    """Refuse settings that pruning without training cannot use.

    Raises:
        ConfigError: There is one.
        ProxyError: The language model cannot be asked.
    """
    prune = config.prune
    if (milliseconds is None) != (prune.objective == "macs"):
        raise ConfigError(
            "prune.objective must be latency with --milliseconds and macs without, got "
            f"{prune.objective}: give the one, or set the other."
        )
    if prune.method == "none":
        raise ConfigError("prune.method must not be none for tdc-ray prune: set --method.")
    if prune.method == "llm":
        check_proxy(config.proxy)
    if prune.halving_steps:
        raise ConfigError(
            f"prune.halving_steps must be 0 for tdc-ray prune, got {prune.halving_steps}: it "
            "takes no gradient step."
        )


def _check_data(config: RunConfig, network: NetworkConfig) -> None:
    """Refuse data that the model does not take.

    Raises:
        ConfigError: Its shape or its labels are others.
        DataError: It is missing or malformed.
    """
    check_shape(config.data, network, "this model")
    check_prompts(config, network)
    dataset, embeds = load_dataset(config.data), num_class_embeds(network)
    log_summary(config.data)
    if embeds and not dataset.num_classes:
        raise ConfigError(
            "the model is conditioned on classes: --data must have a label for every image."
        )
    if embeds and dataset.num_classes and dataset.num_classes > embeds:
        raise ConfigError(
            f"labels of --data must be below {embeds}, the classes that the model embeds, got "
            f"{dataset.num_classes - 1}."
        )


def _time(
    config: RunConfig,
    space: Space,
    widths: Scheme,
    limit_ms: float,
    base: Denoiser,
    pruned: Denoiser,
) -> dict[str, object]:
    """Return the times of a pruned model and its base: by the table, and measured directly."""
    size = config.prune.latency_batch_size
    whole, part = time_passes(
        [base, pruned.eval()], size, min_repeats=MIN_REPEATS, min_seconds=MIN_SECONDS
    )
    return {
        "device": device_name(base.device),
        "batch_size": size,
        "limit_ms": limit_ms,
        "base_table_ms": space.cost_base / 1e6,
        "table_ms": space.cost(widths) / 1e6,
        "base_ms": 1e3 * whole.total,
        "ms": 1e3 * part.total,
    }


def for_unet(config: RunConfig, unet: NetworkConfig, data: str | None) -> RunConfig:
    """Return settings that fit a UNet: its noise process, and its data if named.

    Raises:
        ConfigError: The data is of no known kind, or the model has no image size.
    """
    if unet.get("sample_size") is None:
        raise ConfigError(
            "sample_size in the model's config.json must be the size of its images, got None: "
            "write a number there, or height and width."
        )
    learned = unet["out_channels"] == 2 * unet["in_channels"]
    config = replace(config, diffusion=replace(config.diffusion, learned_sigma=learned))
    if data is None:
        return config
    config = with_data(config, _named_data(data, config, unet))
    if data == BASE_SAMPLES and config.conditioning.num_classes is None:
        # All that the network embeds are drawn, a class that stands for none among them.
        conditioning = replace(config.conditioning, num_classes=unet.get("num_class_embeds"))
        config = replace(config, conditioning=conditioning)
    return config


def _named_data(source: str, config: RunConfig, unet: NetworkConfig) -> DataConfig:
    """Return data in the UNet's shape, unless it takes a first stage's latents.

    Raises:
        ConfigError: The data is of no known kind, or the UNet does not take images.
    """
    data, channels = config.data, unet["in_channels"]
    if data.first_stage is None:
        if channels not in (1, 3):
            raise ConfigError(
                f"the model must take images of 1 or 3 channels, got {channels}: it denoises "
                "something else. If it is latents, name --data.first-stage."
            )
        data = replace(data, image_size=image_size(unet), num_channels=1 if channels == 1 else 3)
    named = data_config(source, data)
    by_folders = named.source == "folder" and num_class_embeds(unet) is not None
    return replace(named, labels_from_folders=named.labels_from_folders or by_folders)


def _state(file: Path) -> tuple[str, int, int]:
    return file.name, file.stat().st_size, file.stat().st_mtime_ns


def _latency_name(config: RunConfig, unet: NetworkConfig) -> str:
    """Return a name for the table of times of a network on this device."""
    shape = {key: value for key, value in unet.items() if not key.startswith("_")}
    prune = config.prune
    device = device_name(worker_device())
    document = [shape, prune.latency_batch_size, prune.channel_multiple, device]
    return f"latency-{json_digest(document)[:8]}.json"


def _search_name(unet: Path, config: RunConfig, group: TimestepGroup, limit: float | str) -> str:
    """Return a name for a search, by everything that decides its measurements."""
    weights = listing(unet, "*.safetensors")
    states = [version(file) if is_remote(file) else _state(file) for file in weights]
    document = [digest(config), display_path(unet), states, group.first, group.last, limit]
    return json_digest(document)[:8]

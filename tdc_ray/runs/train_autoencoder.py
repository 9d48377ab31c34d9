"""Trains a small first stage in this process: ``tdc-ray train-autoencoder``.

An ``AutoencoderKL`` with the plain loss: L1 or squared error and a small divergence. There is no
discriminator and no perceptual loss, so that large photographs will look smooth (LDM,
arXiv:2112.10752, section 3.1, has both).
"""

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tdc_ray.config.autoencoder import AutoencoderConfig
from tdc_ray.config.run import named_differences
from tdc_ray.data.batches import augment, batches, fixed_batches, held_out_split, to_minus_one_one
from tdc_ray.data.dataset import ImageBatch, ImageDataset
from tdc_ray.data.load import load_dataset, with_commit
from tdc_ray.data.survey import log_summary
from tdc_ray.diffusion.train import LossWindow, TrainState, start_state, update
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.events import EventSink, Finished, Started, listening, reporter
from tdc_ray.execution.item import Report
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.first_stage import FirstStage, input_shape, load_first_stage, save_first_stage
from tdc_ray.models.precision import autocast
from tdc_ray.runs.same_images import check_images, note_images, warn_of_other_images
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import exists, read_json, remove, write_json
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.provenance import commit, versions

REPORT_FILE = "report.json"
SETTINGS_FILE = "settings.json"
CHECKPOINT_FILE = "checkpoint.pt"
KEY = "autoencoder"

SCALE_IMAGES = 2048
"""Most training images over whose latents the scaling factor is measured."""

logger = logging.getLogger(__name__)


def train_autoencoder(
    config: AutoencoderConfig, out: Path, sinks: Sequence[EventSink] = ()
) -> dict[str, Any]:
    """Train a first stage, from the checkpoint of an earlier call on.

    Args:
        config: The settings.
        out: The diffusers folder, with ``report.json`` beside the weights.
        sinks: Called with the events of training.

    Returns:
        The report: ``held_out`` has the errors of reconstructions of images that no step saw, in
        [-1, 1], and ``psnr_db``.

    Raises:
        DataError: The dataset is missing or malformed.
        StorageError: ``out`` is in use, or is of other settings, or they are unreadable.
        NonFiniteLossError: Training diverged.
    """
    started = time.perf_counter()
    config, out = _with_absolute_path(config), resolve_path(out)
    config = replace(config, data=with_commit(config.data, _recorded_images(out)))
    dataset = load_dataset(config.data)
    log_summary(config.data)
    rest, held_out = held_out_split(dataset, config.held_out_share, config.seed)
    with hold_lease(out):
        _keep_settings(out, config)
        if exists(out / REPORT_FILE):
            logger.info("%s is finished; nothing is done again", display_path(out))
            warn_of_other_images(out, config.data)
            earlier: dict[str, Any] = read_json(out / REPORT_FILE)
            return earlier
        check_images(out, config.data)
        state = _trained(config, dataset, rest, out, sinks)
        size, count = config.train.batch_size, min(SCALE_IMAGES, len(rest))
        sample = fixed_batches(dataset, count, size, config.seed, indices=rest)
        with state.ema_weights() as model:
            model.register_to_config(scaling_factor=_scaling_factor(model, sample))
            save_first_stage(model, out)
        first_stage = load_first_stage(out).to(worker_device())
        parts = (held_out[start : start + size] for start in range(0, len(held_out), size))
        errors = reconstruction_errors(first_stage, map(dataset.__getitems__, parts))
        report = {
            "held_out": errors | {"num_images": len(held_out)},
            "scaling_factor": first_stage.scaling_factor,
            "latent_shape": list(input_shape(replace(config.data, first_stage=str(out)))),
            "num_params": count_params(first_stage),
            "num_steps": state.step,
            "dataset": config.data.name,
            "fingerprint": dataset.fingerprint(),
            "seconds": time.perf_counter() - started,
            "versions": versions(),
            "commit": commit(),
        }
        write_json(out / REPORT_FILE, report)
        remove(out / CHECKPOINT_FILE)
    return report


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """Build the model with random weights; its scaling factor is measured after training."""
    depth = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=config.data.num_channels,
        out_channels=config.data.num_channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.data.image_size,
        scaling_factor=1.0,
    )


def autoencoder_loss(
    model: AutoencoderKL, images: Tensor, config: AutoencoderConfig, generator: torch.Generator
) -> Tensor:
    """Compute the mean over pixels of error and weighted divergence (LDM, appendix G).

    Args:
        model: The autoencoder.
        images: ``(B, C, H, W)`` in [-1, 1].
        config: Which error, and the divergence's weight.
        generator: Draws the sample from the posterior.
    """
    posterior = model.encode(images).latent_dist
    error = model.decode(posterior.sample(generator)).sample.float() - images
    off = error.abs().sum() if config.loss == "l1" else error.square().sum()
    loss: Tensor = (off + config.kl_weight * posterior.kl().sum()) / images.numel()
    return loss


def reconstruction_errors(
    first_stage: FirstStage, images: Iterable[ImageBatch]
) -> dict[str, float]:
    """Compute mean ``l1`` and ``mse`` of reconstructions in [-1, 1], and ``psnr_db``."""
    device, off, squared, count = first_stage.device, 0.0, 0.0, 0
    for batch, _ in images:
        x = to_minus_one_one(batch.to(device))
        error = (first_stage.decode(first_stage.encode(x)).clamp(-1, 1) - x).double()
        off += float(error.abs().sum())
        squared += float(error.square().sum())
        count += x.numel()
    mse = squared / count
    psnr_db = 10 * math.log10(4 / mse) if mse else math.inf  # the range is 2, its square 4
    return {"l1": off / count, "mse": mse, "psnr_db": psnr_db}


def _trained(
    config: AutoencoderConfig,
    dataset: ImageDataset,
    indices: Sequence[int],
    out: Path,
    sinks: Sequence[EventSink],
) -> TrainState:
    """Train on some of the images, from an earlier call's checkpoint on."""
    torch.manual_seed(derive_seed(config.seed, KEY, "init"))
    model = build_autoencoder(config).to(worker_device())
    state = start_state(model, config.train)  # its `unet` may be any model
    if exists(out / CHECKPOINT_FILE):
        state.load(out / CHECKPOINT_FILE)
        logger.info("resuming from step %d", state.step)
    images = batches(
        dataset,
        indices=indices,
        batch_size=config.train.batch_size,
        seed=derive_seed(config.seed, KEY, "order"),
        start_step=state.step,
        num_steps=config.train.num_steps,
        num_workers=config.data.num_workers,
    )
    with listening(sinks) as events:
        events(Started(KEY, config.train.num_steps))
        _train(state, config, images, out, reporter(events, KEY))
        events(Finished(KEY))
    return state


def _train(
    state: TrainState,
    config: AutoencoderConfig,
    images: Iterable[ImageBatch],
    out: Path,
    report: Report,
) -> None:
    """Train from ``state.step`` on; all that is random follows from seed and step."""
    train, losses = config.train, LossWindow(state.step)
    for batch, _ in images:
        seed_parts = (config.seed, KEY, state.step)
        generator = torch.Generator(state.device).manual_seed(derive_seed(*seed_parts, "sample"))
        augment_generator = torch.Generator().manual_seed(derive_seed(*seed_parts, "augment"))
        x = to_minus_one_one(augment(batch, config.data, augment_generator).to(state.device))
        with autocast(train.precision, state.device):
            loss = autoencoder_loss(state.unet, x, config, generator)
        state.scaler.scale(loss).backward()
        losses.add(loss.detach())
        grad_norm = update(state, train)
        last = state.step == train.num_steps
        checkpoint = last or state.step % train.checkpoint_every == 0
        if checkpoint or state.step % train.log_every == 0:
            mean, speed = losses.take()
            metrics = {"loss": mean, "steps_per_second": speed, "grad_norm": float(grad_norm)}
            report(metrics, state.step)
        if checkpoint:
            state.save(out / CHECKPOINT_FILE)


@torch.inference_mode()
def _scaling_factor(model: AutoencoderKL, images: Iterable[ImageBatch]) -> float:
    """Compute one over the latents' standard deviation (LDM, appendix G)."""
    modes = [
        model.encode(to_minus_one_one(batch.to(model.device))).latent_dist.mode()
        for batch, _ in images
    ]
    return 1.0 / float(torch.cat(modes).double().std())


def _with_absolute_path(config: AutoencoderConfig) -> AutoencoderConfig:
    path = config.data.path
    if path is None or config.data.is_on_hub:
        return config
    return replace(config, data=replace(config.data, path=str(resolve_path(path).resolve())))


def _recorded_images(out: Path) -> str | None:
    """Return the ``data.path`` of an earlier call, if there was one.

    Raises:
        StorageError: Its settings are unreadable, or of another version.
    """
    path = out / SETTINGS_FILE
    if not exists(path):
        return None
    document = read_json(path)
    try:
        AutoencoderConfig(**document)  # which checks it
        recorded: str | None = document["data"]["path"]
    except (ConfigError, KeyError, TypeError) as error:
        raise StorageError(
            f"{display_path(path)} is of another version, or holds no settings ({error}). Choose "
            "another --out."
        ) from error
    return recorded


def _keep_settings(out: Path, config: AutoencoderConfig) -> None:
    """Write the settings and what the images are, or check that an earlier call had the same."""
    settings = asdict(config) | {"block_out_channels": list(config.block_out_channels)}
    if exists(out / SETTINGS_FILE):
        changed = named_differences(read_json(out / SETTINGS_FILE), settings)
        if changed:
            raise StorageError(
                f"{display_path(out)} has other settings: {'; '.join(changed)}. Use the same "
                "settings to resume, or another --out."
            )
    else:
        note_images(out, config.data)
        write_json(out / SETTINGS_FILE, settings)

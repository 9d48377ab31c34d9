"""Stage 1 on one of Ray Train's workers: trains, samples a grid of images, saves the base."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ray.train.torch
import torch
from diffusers import UNet2DModel
from ray.train import Checkpoint
from torch import Tensor, nn

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import batches
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.pipeline import base_pipeline
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.execution.device import WorkerRank, configure_worker
from tdc_ray.execution.events import EventSink, Reported, ignore, reporter
from tdc_ray.execution.item import ItemResult, Report
from tdc_ray.models.families import build_network, save_network
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.run_dir import RunDir

STATE_FILE = "state.pt"


@dataclass(frozen=True, slots=True)
class BaseResult:
    """The size of the base, and the cost of its training."""

    macs: int
    num_params: int
    train_steps: int
    train_macs: float
    """Three forward passes per image seen."""

    seconds: float


def train_rank(run_dir: RunDir, config: RunConfig, key: str, events: EventSink) -> None:
    """Train as one of the workers, from the last checkpoint on; the first worker saves the base.

    Raises:
        NonFiniteLossError: Training diverged.
        CheckpointError: The checkpoint does not fit.
        DataError: The dataset is missing or malformed.
        StorageFailedError: The base cannot be written.
    """
    started = time.perf_counter()
    context = ray.train.get_context()
    rank = context.get_world_rank()
    configure_worker(config.compute.cpus_per_base_worker, tf32=config.compute.tf32)
    worker = WorkerRank(rank, context.get_world_size(), ray.train.torch.get_device())

    def save(state: TrainState) -> None:
        if rank != 0:
            ray.train.report({"step": state.step})
            return
        events(Reported(key, state.step, {}, sample_grid(state, config).numpy()))
        with tempfile.TemporaryDirectory() as folder:
            state.save(Path(folder) / STATE_FILE)
            ray.train.report({"step": state.step}, checkpoint=Checkpoint.from_directory(folder))

    checkpoint = ray.train.get_checkpoint()
    with ExitStack() as stack:
        folder = checkpoint and stack.enter_context(checkpoint.as_directory())
        state = train_base(
            config,
            worker,
            resume_from=Path(folder) / STATE_FILE if folder else None,
            wrap=ray.train.torch.prepare_model,
            report=reporter(events if rank == 0 else ignore, key),
            save=save,
        )
    if rank == 0:
        _finish(run_dir, config, state, time.perf_counter() - started)


def _finish(run_dir: RunDir, config: RunConfig, state: TrainState, seconds: float) -> None:
    """Save the averaged weights, then the result: a base that has one is finished."""
    unet_config = base_unet(config.model, config.conditioning)
    with state.ema_weights() as unet:
        save_network(unet, run_dir.base_unet)
    structure = network_structure(unet_config)
    train_macs = 3.0 * structure.macs * state.step * config.base.batch_size
    result = BaseResult(structure.macs, structure.num_params, state.step, train_macs, seconds)
    ItemResult(result).save(run_dir.base_result)


def train_base(
    config: RunConfig,
    worker: WorkerRank,
    *,
    resume_from: Path | None,
    wrap: Callable[[UNet2DModel], nn.Module],
    report: Report,
    save: Callable[[TrainState], None],
) -> TrainState:
    """Train the base on all timesteps (TDC Eq. 6), from a checkpoint on; knows nothing of Ray.

    Args:
        config: The run's settings.
        worker: This worker.
        resume_from: A checkpoint file of an earlier attempt; a finished one takes no step.
        wrap: Wraps the UNet for data parallel training.
        report: Called with metrics and the step.
        save: Called with the state to save, on every rank.

    Raises:
        NonFiniteLossError: Training diverged.
        CheckpointError: The checkpoint does not fit.
        DataError: The dataset is missing or malformed.
    """
    torch.manual_seed(derive_seed(config.seed, "init"))
    unet = build_network(
        {**base_unet(config.model, config.conditioning), "dropout": config.model.dropout}
    )
    state = start_state(unet.to(worker.device), config.base)
    if resume_from is not None:
        state.load(resume_from)
    images = batches(
        training_data(config.data, config.evaluate.cache_dir).open(),
        batch_size=config.base.batch_size,
        seed=derive_seed(config.seed, "base", "order"),
        start_step=state.step,
        num_steps=config.base.num_steps,
        rank=worker.rank,
        world_size=worker.world_size,
        num_workers=config.data.num_workers,
    )
    train(
        state,
        wrap(unet),
        images,
        noise_schedule(config.diffusion).to(worker.device),
        config.base,
        config.data,
        timesteps=range(config.diffusion.num_timesteps),
        seed=derive_seed(config.seed, "base"),
        rank=worker.rank,
        label_dropout=config.conditioning.label_dropout,
        report=report,
        save=save,
    )
    return state


def sample_grid(state: TrainState, config: RunConfig, num_images: int = 16) -> Tensor:
    """Sample a few images with the averaged weights: uint8, ``(B, H, W, C)``."""
    with state.ema_weights() as unet:
        pipeline = base_pipeline(unet, pipeline_index(config)).to(state.device)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(num_images, seed=config.evaluate.seed, output_type="np").images
    return torch.from_numpy(images)

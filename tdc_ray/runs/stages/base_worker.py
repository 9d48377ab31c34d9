"""Stage 1 on one of Ray Train's workers: trains, samples a grid of images, saves the base."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import ray.train.torch
import torch
from diffusers import UNet2DModel
from ray.train import Checkpoint
from torch import Tensor, nn

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import base_indices, batches
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.pipeline import base_pipeline
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.sharding import sharding_mesh
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.execution.device import WorkerRank, configure_worker
from tdc_ray.execution.events import EventSink, Reported, ignore, reporter
from tdc_ray.execution.item import ItemResult, Report
from tdc_ray.models.families import build_network, save_network
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.runs.pipelines import image_conditions, pipeline_index
from tdc_ray.runs.stages.base_result import STEP_FILE, BaseResult
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir

STATE_FILE = "state.pt"


def train_rank(run_dir: RunDir, config: RunConfig, key: str, events: EventSink) -> None:
    """Train as one of the workers, from the last checkpoint on; the first worker saves the base.

    All of them gather what is saved and sampled, where they share it.

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
        with tempfile.TemporaryDirectory() as folder:
            state.save(Path(folder) / STATE_FILE)
            write_json(Path(folder) / STEP_FILE, {"step": state.step})
            if rank == 0 or state.structure is not None:  # all gather what they share
                with state.ema_weights() as unet:
                    if rank == 0:  # the others wait in the report
                        events(Reported(key, state.step, {}, sample_grid(unet, config).numpy()))
            file = Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report({"step": state.step}, checkpoint=file)

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
    with state.ema_weights() as unet:
        if rank == 0:
            save_network(unet, run_dir.base_unet)
            save_result(run_dir, config, state.step, time.perf_counter() - started)


def save_result(run_dir: RunDir, config: RunConfig, steps: int, seconds: float) -> None:
    """Save the result, after the weights: a base that has one is finished."""
    structure = network_structure(base_unet(config.model, config.conditioning))
    train_macs = 3.0 * structure.macs * steps * config.base.batch_size
    result = BaseResult(structure.macs, structure.num_params, steps, train_macs, seconds)
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
        wrap: Wraps the UNet for data parallel training, unless the workers share it.
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
    mesh = sharding_mesh(worker) if config.compute.sharding == "full" else None
    state = start_state(unet if mesh else unet.to(worker.device), config.base, mesh=mesh)
    if resume_from is not None:
        state.load(resume_from)
    data = training_data(config.data, config.evaluate.cache_dir)
    dataset = data.open()
    images = batches(
        dataset,
        indices=base_indices(dataset, config.prune, config.seed),
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
        state.unet if mesh else wrap(state.unet),
        images,
        noise_schedule(config.diffusion).to(worker.device),
        config.base,
        config.data,
        timesteps=range(config.diffusion.num_timesteps),
        seed=derive_seed(config.seed, "base"),
        rank=worker.rank,
        label_dropout=config.conditioning.label_dropout,
        caption_dropout=data.caption_dropout(config.conditioning.caption_dropout),
        report=report,
        save=save,
    )
    return state


def sample_grid(unet: UNet2DModel, config: RunConfig, num_images: int = 16) -> Tensor:
    """Sample a few images by a base: uint8, ``(B, H, W, C)``."""
    pipeline = base_pipeline(unet, pipeline_index(config)).to(unet.device)
    pipeline.set_progress_bar_config(disable=True)
    conditions = image_conditions(config, 0, num_images)
    images = pipeline(num_images, seed=config.evaluate.seed, output_type="np", **conditions).images
    return torch.from_numpy(images)

"""What a worker of stage 1 does under Ray Train."""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import ray.train.torch
from ray.train import Checkpoint

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.train import TrainState
from tdc_ray.execution.device import WorkerRank, configure_worker
from tdc_ray.execution.events import EventSink, Reported, ignore, reporter
from tdc_ray.execution.item import ItemResult
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.unet2d.unet import save_unet
from tdc_ray.runs.stages.base import BaseResult, sample_grid, train_base
from tdc_ray.storage.run_dir import RunDir

STATE_FILE = "state.pt"


def train_rank(run_dir: RunDir, config: RunConfig, key: str, events: EventSink) -> None:
    """Train as one of the workers, from the last checkpoint on; the first one saves the base.

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
    place = WorkerRank(rank, context.get_world_size(), ray.train.torch.get_device())

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
            place,
            resume_from=Path(folder) / STATE_FILE if folder else None,
            wrap=ray.train.torch.prepare_model,
            report=reporter(events if rank == 0 else ignore, key),
            save=save,
        )
    if rank == 0:
        _finish(run_dir, config, state, time.perf_counter() - started)


def _finish(run_dir: RunDir, config: RunConfig, state: TrainState, seconds: float) -> None:
    """Save the averaged weights, then the result, whose existence says that the base is done."""
    unet_config = base_unet(config.model, config.conditioning)
    with state.ema_weights() as unet:
        save_unet(unet, run_dir.base_unet, num_heads=unet_config.get("num_heads"))
    structure = network_structure(unet_config)
    train_macs = 3.0 * structure.macs * state.step * config.base.batch_size
    result = BaseResult(structure.macs, structure.num_params, state.step, train_macs, seconds)
    ItemResult(result).save(run_dir.base_result)

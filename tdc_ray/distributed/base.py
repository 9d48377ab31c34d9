"""Stage 1 under Ray Train's TorchTrainer: several workers, checkpoints, life after a kill."""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from diffusers import UNet2DModel
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchTrainer
from torch import nn

from tdc_ray import errors
from tdc_ray.base import sample_grid, train_base
from tdc_ray.compute_settings import ComputeConfig
from tdc_ray.config import RunConfig
from tdc_ray.device import Place
from tdc_ray.distributed.cluster import Board, is_local, node_resources
from tdc_ray.distributed.policy import num_fitting
from tdc_ray.errors import ClusterError, StorageFailedError, TdcError, WorkFailedError
from tdc_ray.layout import RunDir
from tdc_ray.models.architectures import base_unet
from tdc_ray.models.layers import count
from tdc_ray.models.unet import save_unet
from tdc_ray.progress import ProgressView
from tdc_ray.remote import filesystem, is_remote
from tdc_ray.storage import exists, read_json, remove, write_json
from tdc_ray.training import TrainState

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
KEY = "base"


@dataclass(frozen=True, slots=True)
class BaseJob:
    """What each worker is told."""

    run_dir: RunDir
    config: RunConfig
    board: Board


def train_base_on_ray(
    run_dir: RunDir, config: RunConfig, board: Board, view: ProgressView
) -> None:
    """Train the base on the cluster; a base that is done is left alone.

    The same call goes on from the last checkpoint of an earlier one, whatever ended that.

    Raises:
        ClusterError: The cluster is too small for the workers asked for.
        TdcError: What a worker raised.
        WorkFailedError: Workers died more often than ``compute.max_attempts`` allows.
    """
    if exists(run_dir.base_result):
        return
    check_cluster(config.compute)
    resources = _resources(config.compute)
    trainer = _Trainer(
        _work,
        train_loop_config={"job": BaseJob(run_dir, config, board)},
        scaling_config=ScalingConfig(
            num_workers=config.compute.num_base_workers,
            use_gpu=config.compute.gpus_per_base_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=TrainRunConfig(
            name=run_dir.base_training.name,
            **storage_of(run_dir.base_training.parent),
            failure_config=FailureConfig(max_failures=config.compute.max_attempts - 1),
            checkpoint_config=CheckpointConfig(num_to_keep=config.base.keep_checkpoints),
        ),
    )
    remove(_error_path(run_dir))
    view.start(KEY, config.base.num_steps)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if not exists(_error_path(run_dir)):
            raise WorkFailedError({KEY: str(error)}) from error
    finally:
        view.finish(KEY)
    if exists(_error_path(run_dir)):
        document = read_json(_error_path(run_dir))
        raise getattr(errors, document["type"])(*document["arguments"])


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C alone: Ray's own handler would keep it for good, and exit with 0 on it."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def _error_path(run_dir: RunDir) -> Path:
    """Where a worker leaves an error of its own, which the driver raises."""
    return run_dir.base_training.parent / "error.json"


def _work(settings: dict[str, Any]) -> None:
    """What one worker does. Ray Train tries all failures again, but our own errors would recur."""
    job: BaseJob = settings["job"]
    if exists(_error_path(job.run_dir)):
        return
    try:
        _train_rank(job)
    except StorageFailedError:
        raise
    except TdcError as error:
        document = {"type": type(error).__name__, "arguments": list(error.args)}
        write_json(_error_path(job.run_dir), document)
        if ray.train.get_context().get_world_size() > 1:
            raise  # the other ranks wait for this one: end them


def _train_rank(job: BaseJob) -> None:
    config, started = job.config, time.perf_counter()
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(config.compute.cpus_per_base_worker)
    place = Place(rank, context.get_world_size(), ray.train.torch.get_device())

    def save(state: TrainState) -> None:
        if rank != 0:
            ray.train.report({"step": state.step})
            return
        job.board.add_images(KEY, state.step, sample_grid(state, config).numpy())
        with tempfile.TemporaryDirectory() as folder:
            state.save(Path(folder) / STATE_FILE)
            ray.train.report({"step": state.step}, checkpoint=Checkpoint.from_directory(folder))

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        state = _train(job, place, None, save)
    else:
        with checkpoint.as_directory() as folder:
            state = _train(job, place, Path(folder) / STATE_FILE, save)
    if rank == 0:
        _finish(job, state, time.perf_counter() - started)


def _train(job: BaseJob, place: Place, resume_from: Path | None, save: Any) -> TrainState:
    return train_base(
        job.config,
        place,
        resume_from=resume_from,
        wrap=_wrap,
        report=job.board.reporter(KEY) if place.rank == 0 else lambda _metrics, _step: None,
        save=save,
    )


def _wrap(unet: UNet2DModel) -> nn.Module:
    wrapped: nn.Module = ray.train.torch.prepare_model(unet)
    return wrapped


def _finish(job: BaseJob, state: TrainState, seconds: float) -> None:
    """Save the averaged weights, then the result, whose existence says that the base is done."""
    config = job.config
    unet_config = base_unet(config)
    with state.averaged() as unet:
        save_unet(unet, job.run_dir.base_unet, num_heads=unet_config.get("num_heads"))
    num_params, macs = count(unet_config)
    result = {
        "macs": macs,
        "num_params": num_params,
        "train_steps": state.step,
        "train_macs": 3.0 * macs * state.step * config.base.batch_size,
        "seconds": seconds,
    }
    write_json(job.run_dir.base_result, result)


def storage_of(folder: Path) -> dict[str, Any]:
    """Tell Ray Train, or Ray Tune, where a folder is."""
    if not is_remote(folder):
        return {"storage_path": str(folder)}
    store, key = filesystem(folder)
    return {"storage_path": key, "storage_filesystem": PyFileSystem(FSSpecHandler(store))}


def _resources(compute: ComputeConfig) -> dict[str, float]:
    resources = {"CPU": float(compute.cpus_per_base_worker)}
    if compute.gpus_per_base_worker > 0:
        resources["GPU"] = compute.gpus_per_base_worker
    return resources


def check_cluster(compute: ComputeConfig) -> None:
    """Refuse what would wait for ever; say once what may wait for nodes to join.

    Raises:
        ClusterError: The cluster is too small for the workers asked for, and cannot grow.
    """
    resources = _resources(compute)
    nodes = node_resources()
    fits = num_fitting(nodes, resources)
    if fits >= compute.num_base_workers:
        return
    needed = (
        f"training the base needs {compute.num_base_workers} workers (compute.num_base_workers) "
        f"of {resources}, of which {fits} fit on the nodes {nodes}"
    )
    if is_local():
        raise ClusterError(
            f"{needed}. Lower compute.num_base_workers, compute.cpus_per_base_worker or "
            "compute.gpus_per_base_worker, or use a larger cluster."
        )
    logger.warning("%s; it waits until there is room", needed)

"""Stage 1 on the driver, by Ray Train's TorchTrainer: several workers that survive a kill.

Train's controller imports this module, so it must not import torch.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as TrainRunConfig
from ray.train.torch import TorchTrainer

from tdc_ray import errors
from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.errors import StorageFailedError, TdcError, WorkFailedError
from tdc_ray.execution.events import EventSink, Finished, Started
from tdc_ray.execution.ray.cluster import check_room
from tdc_ray.execution.ray.event_collector import EventCollector
from tdc_ray.storage.fence import Fence, adopt, fences
from tdc_ray.storage.files import exists, read_json, remove, write_json
from tdc_ray.storage.object_store import filesystem, is_remote
from tdc_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BaseJob:
    """The arguments of each worker."""

    run_dir: RunDir
    config: RunConfig
    key: str
    """Its name in events."""

    events: EventSink
    fences: Sequence[Fence]


def train_base_on_ray(
    run_dir: RunDir, config: RunConfig, key: str, events: EventCollector
) -> None:
    """Train the base on the cluster, unless it is finished.

    The same call resumes from the last checkpoint of an earlier one, whatever interrupted that.

    Raises:
        ClusterError: The cluster is too small for the workers.
        TdcError: What a worker raised.
        WorkFailedError: Workers died more often than ``compute.max_attempts`` allows.
    """
    if exists(run_dir.base_result):
        return
    check_cluster(config.compute)
    resources = _resources(config.compute)
    trainer = _Trainer(
        _work,
        train_loop_config={"job": BaseJob(run_dir, config, key, events.remote, fences())},
        scaling_config=ScalingConfig(
            num_workers=config.compute.num_base_workers,
            use_gpu="GPU" in resources,
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
    events(Started(key, config.base.num_steps))
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if not exists(_error_path(run_dir)):
            raise WorkFailedError({key: str(error)}) from error
    finally:
        events(Finished(key))
    if exists(_error_path(run_dir)):
        document = read_json(_error_path(run_dir))
        raise getattr(errors, document["type"])(*document["arguments"])


class _Trainer(TorchTrainer):
    """Does not handle Ctrl-C: Ray's handler would stay installed, and exit with 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def _error_path(run_dir: RunDir) -> Path:
    """Return the file in which a worker writes this package's errors, for the driver to raise."""
    return run_dir.base_training.parent / "error.json"


def _work(settings: dict[str, Any]) -> None:
    """Train as one worker; Ray Train calls it again after any failure."""
    job: BaseJob = settings["job"]
    adopt(job.fences)
    if exists(_error_path(job.run_dir)):
        return  # an error raised by this package would only recur
    # The controller must not import it: it needs torch.
    from tdc_ray.runs.stages.base_worker import train_rank

    try:
        train_rank(job.run_dir, job.config, job.key, job.events)
    except StorageFailedError:
        raise
    except TdcError as error:
        document = {"type": type(error).__name__, "arguments": list(error.args)}
        write_json(_error_path(job.run_dir), document)
        if ray.train.get_context().get_world_size() > 1:
            raise  # ends the other ranks, which wait for this one


def storage_of(folder: Path) -> dict[str, Any]:
    """Return a folder as arguments of Ray Train and Ray Tune."""
    if not is_remote(folder):
        return {"storage_path": str(folder)}
    store, key = filesystem(folder)
    return {"storage_path": key, "storage_filesystem": PyFileSystem(FSSpecHandler(store))}


def _resources(compute: ComputeConfig) -> dict[str, float]:
    resources = {"CPU": float(compute.cpus_per_base_worker)}
    if compute.gpus_per_base_worker:
        resources["GPU"] = compute.gpus_per_base_worker
    return resources


def check_cluster(compute: ComputeConfig) -> None:
    """Check that the workers of stage 1 have room; warn where they may once nodes have joined.

    Raises:
        ClusterError: They have no room, and no node will join.
    """
    names = ("num_base_workers", "cpus_per_base_worker", "gpus_per_base_worker")
    settings = ", ".join(f"compute.{name}" for name in names)
    number, resources = compute.num_base_workers, _resources(compute)
    if not check_room(number, resources, settings):
        logger.warning(
            "training the base waits until %d workers of %s fit on the nodes", number, resources
        )

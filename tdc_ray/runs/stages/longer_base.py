"""Trains the base on by as many macs as TDC spent beyond stage 1: what TDC is compared with.

It continues from stage 1's last checkpoint, optimizer and averaged weights included, where that is
left, on the images that fine-tunes see, so that the base has no advantage on those held out. What
costs a fine-tune nothing the base has too: a learning rate that decays, perturbed inputs, weights
averaged with those of the start.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.batches import batches, held_out_split
from tdc_ray.data.fingerprint import training_key
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.sharding import sharding_mesh
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.errors import CheckpointError, StorageFailedError
from tdc_ray.execution.device import WorkerRank, all_gather, worker_rank
from tdc_ray.execution.item import Inputs, Report, WorkItem, base_resources
from tdc_ray.models.families import load_config, load_network, save_network
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.structure import network_structure
from tdc_ray.runs.stages.data_key import base_workers_key, run_data_key
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import exists
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir

VERSION = 1
"""Changes whenever what the training results in does, so that cached bases are trained again."""


@dataclass(frozen=True, slots=True)
class LongerBaseJob:
    """Train a run's base on."""

    run_dir: RunDir
    config: RunConfig
    num_steps: int
    """Beyond those of stage 1."""

    continues: Path | None
    """Stage 1's last checkpoint. None means that there is none: the averaged weights are trained
    on by an optimizer that starts afresh, with a warm-up of its own."""

    @property
    def first_step(self) -> int:
        """The step of the first update, counted from stage 1's first."""
        return 0 if self.continues is None else self.config.base.num_steps

    @property
    def train(self) -> TrainConfig:
        """The base's settings, with the fine-tunes' learning-rate schedule and perturbation."""
        config, finetune = self.config, self.config.finetune
        warmup = config.base.num_warmup_steps if self.continues is None else self.first_step
        return replace(
            config.base,
            num_steps=self.first_step + self.num_steps,
            num_warmup_steps=warmup,
            lr_schedule=finetune.lr_schedule,
            input_perturbation=max(config.base.input_perturbation, finetune.input_perturbation),
        )

    @property
    def checkpoint(self) -> Path:
        """Where it is kept while it trains."""
        return self.run_dir.comparison / "base.pt"


@dataclass(frozen=True, slots=True)
class LongerBaseResult:
    """What training the base on took, beyond stage 1."""

    steps: int
    macs_spent: float
    """Three forward passes per image seen."""

    continued: bool
    """Whether the optimizer went on from stage 1."""

    seconds: float
    """Of the last attempt."""


def steps_for(macs: float, macs_base: int, batch_size: int) -> int:
    """Return how many steps of the base cost so many macs, at least."""
    return math.ceil(macs / (3.0 * macs_base * batch_size))


def longer_base_item(job: LongerBaseJob) -> WorkItem[LongerBaseJob, LongerBaseResult]:
    """Make the item that trains the base on: by as many workers as stage 1 has."""
    compute, macs = job.config.compute, _macs_of(job)
    return WorkItem(
        key="longer-base/train",
        function=train_longer_base,
        job=job,
        result_path=job.run_dir.comparison / "base.json",
        result_type=LongerBaseResult,
        cost=macs,
        num_steps=job.train.num_steps,
        resources=base_resources(compute),
        num_workers=compute.num_base_workers,
        reduce_memory=smaller_micro_batch,
        inputs=longer_base_inputs,
        files=(job.run_dir.longer_base,),
    )


def longer_base_inputs(job: LongerBaseJob) -> Inputs:
    """Return what the base trained on follows from."""
    config = job.config
    return {
        "stage": "longer-base",
        "version": VERSION,
        "base": weights_digest(job.run_dir.base_unet),
        "continues": job.continues is not None,
        "average_with_start": config.finetune.average_with_start,
        "held_out_share": config.prune.held_out_share,
        **base_workers_key(config.compute),
        **run_data_key(config),
        **training_key(job.train),
    }


def smaller_micro_batch(job: LongerBaseJob) -> LongerBaseJob | None:
    """Return the same training with half the images at once; None where it is down to one."""
    base = job.config.base
    share = base.batch_size // job.config.compute.num_base_workers
    size = min(base.micro_batch_size or share, share)
    if size == 1:
        return None
    smaller = replace(base, micro_batch_size=-(-size // 2))
    return replace(job, config=replace(job.config, base=smaller))


def train_longer_base(job: LongerBaseJob, report: Report) -> LongerBaseResult | None:
    """Train the base on, or resume from the checkpoint of an earlier attempt, and save it.

    Raises:
        NonFiniteLossError: Training diverged.
        CheckpointError: The base or a checkpoint cannot be read, or is of another training.
    """
    started, rank = time.perf_counter(), worker_rank()
    state = _start(job, rank)
    _train(state, job, rank, report)
    with state.ema_weights(job.config.finetune.average_with_start) as averaged:
        if rank.rank != 0:
            return None
        save_network(averaged, job.run_dir.longer_base)
    return LongerBaseResult(
        steps=job.num_steps,
        macs_spent=_macs_of(job),
        continued=job.continues is not None,
        seconds=time.perf_counter() - started,
    )


def _macs_of(job: LongerBaseJob) -> float:
    macs = network_structure(load_config(job.run_dir.base_unet)).macs
    return 3.0 * macs * job.num_steps * job.config.base.batch_size


def _start(job: LongerBaseJob, rank: WorkerRank) -> TrainState:
    unet = load_network(job.run_dir.base_unet)
    mesh = sharding_mesh(rank) if job.config.compute.sharding == "full" else None
    state = start_state(
        unet if mesh else unet.to(rank.device),
        job.train,
        keep_start=job.config.finetune.average_with_start > 0,
        mesh=mesh,
    )
    start = state.start
    if exists(job.checkpoint):
        state.load(job.checkpoint)
    elif job.continues is not None:
        state.start = None  # which stage 1's checkpoint does not hold
        state.load(job.continues)
        if state.step != job.first_step:
            raise CheckpointError(
                f"{display_path(job.continues)} is of step {state.step}, expected stage 1's last, "
                f"{job.first_step}. Remove {display_path(job.continues.parent)} to train the base "
                "on from its weights alone."
            )
    state.start = start
    if len(set(steps := all_gather(state.step))) > 1:  # on NFS one may see an older file
        raise StorageFailedError(
            f"the workers that train the base on see {display_path(job.checkpoint)} at the steps "
            f"{steps}."
        )
    return state


def _train(state: TrainState, job: LongerBaseJob, rank: WorkerRank, report: Report) -> None:
    config, device = job.config, rank.device
    longer = job.train
    model: nn.Module = state.unet
    if rank.world_size > 1 and state.structure is None:
        model = nn.parallel.DistributedDataParallel(state.unet)
    data = training_data(config.data, config.evaluate.cache_dir)
    dataset = data.open()
    indices, _ = held_out_split(dataset, config.prune.held_out_share, config.seed)
    images = batches(
        dataset,
        indices=indices,
        batch_size=longer.batch_size,
        seed=derive_seed(config.seed, "longer-base", "order"),
        start_step=state.step,
        num_steps=longer.num_steps,
        rank=rank.rank,
        world_size=rank.world_size,
        num_workers=config.data.num_workers,
    )
    train(
        state,
        model,
        images,
        noise_schedule(config.diffusion).to(device),
        longer,
        config.data,
        timesteps=range(config.diffusion.num_timesteps),
        seed=derive_seed(config.seed, "longer-base"),
        rank=rank.rank,
        label_dropout=config.conditioning.label_dropout,
        caption_dropout=data.caption_dropout(config.conditioning.caption_dropout),
        report=report,
        save=lambda current: current.save(job.checkpoint),
    )

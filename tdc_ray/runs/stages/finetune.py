"""Stage 2's second half: fine-tunes a pruned expert on its group's timesteps (TDC Eq. 8)."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.train import FinetuneConfig
from tdc_ray.data.batches import batches, held_out_split
from tdc_ray.data.fingerprint import training_key
from tdc_ray.diffusion.loss import Teacher
from tdc_ray.diffusion.moments import adopt_moments
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.errors import CheckpointError, NonFiniteLossError, StorageFailedError
from tdc_ray.execution.device import all_gather, worker_rank
from tdc_ray.execution.item import Inputs, R, Report, WorkItem, actor_resources
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.families import family_of, load_config
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.models.units import KeptIndices, widths_of
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.fingerprint import group_key
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import LoadedBase, load_base, prune_and_refit
from tdc_ray.pruning.noised import held_out_loss
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import exists
from tdc_ray.storage.object_store import display_path

logger = logging.getLogger(__name__)

VERSION = 2
"""Rises whenever the results of a fine-tune change, so that cached ones are computed again."""

NO_BASE_CHECKPOINT = (
    "finetune.optimizer_state base needs the last checkpoint of the training that made the base, "
    "and there is none. Use new in another run directory, or train the base there without a cache."
)
"""The error of ``finetune.optimizer_state`` where the moments are gone."""


@dataclass(frozen=True, slots=True)
class FinetuneJob:
    """Fine-tune a sub-model of the base on a group's timesteps."""

    context: PruningContext
    group: TimestepGroup
    kept: KeptIndices
    train: FinetuneConfig
    num_workers: int
    """Workers that train it side by side, data parallel."""

    checkpoint: Path
    steps_before: int = 0
    """Steps of an earlier item."""

    @property
    def num_images(self) -> int:
        """Images that training sees, those of an earlier item not counted."""
        return (self.train.num_steps - self.steps_before) * self.train.batch_size


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """The size and the loss of a saved expert, and the cost of its training."""

    macs: int
    num_params: int
    loss_finetuned: float
    """Loss on held-out images and noise."""

    train_steps: int
    train_macs: float
    """Of all images seen; see :func:`macs_per_image`."""

    seconds: float
    """Seconds of the last attempt."""


@dataclass(frozen=True, slots=True)
class ShortFinetuneResult:
    """The loss after a few steps, and their cost."""

    loss: float
    """Loss on held-out images and noise; infinite if training diverged."""

    macs: float
    seconds: float


def finetune_expert(job: FinetuneJob, report: Report) -> FinetuneResult | None:
    """Fine-tune, or resume from the checkpoint of an earlier attempt, and save the expert.

    The expert starts from the base's averaged weights, pruned and refitted, and is saved with its
    own averaged weights, averaged with those of the start as ``train.average_with_start`` says.
    Without steps it is the refitted model.

    Raises:
        NonFiniteLossError: Training diverged.
        CheckpointError: The base or the checkpoint cannot be read.
    """
    started, run_dir = time.perf_counter(), job.context.run_dir
    base = load_base(job.context, job.group)
    state = _tune(base, job, report)
    if worker_rank().rank != 0:
        return None
    with state.ema_weights(job.train.average_with_start) as averaged:
        save_expert(
            run_dir.expert(job.group.index), averaged, load_config(run_dir.base_unet), job.kept
        )
        loss = held_out_loss(averaged, job.context, job.group, base.schedule)
    macs = base.space.macs(widths_of(job.kept))
    return FinetuneResult(
        macs=macs,
        num_params=count_params(state.unet),
        loss_finetuned=loss,
        train_steps=job.train.num_steps,
        train_macs=macs_per_image(job.train, macs, base.space.macs_base) * job.num_images,
        seconds=time.perf_counter() - started,
    )


def macs_per_image(train: FinetuneConfig, macs: float, macs_base: float) -> float:
    """Return the macs of a training step per image: three forward passes, and the teacher's one.

    Args:
        train: The settings, which say whether the base teaches.
        macs: Of a forward pass of what is trained.
        macs_base: Of a forward pass of the base.
    """
    return 3.0 * macs + (macs_base if train.distillation_share else 0.0)


def finetune_inputs(job: FinetuneJob) -> Inputs:
    """Return the cache inputs of a fine-tune, and of a short one."""
    return {
        "stage": "finetune",
        "version": VERSION,
        "kept": job.kept,
        "workers": job.num_workers,
        **group_key(job.context, job.group),
        **training_key(job.train),
    }


def short_finetune_inputs(job: FinetuneJob) -> Inputs:
    """Return the cache inputs of :func:`short_finetune`, whose results are of another type."""
    return {**finetune_inputs(job), "stage": "try", "steps_before": job.steps_before}


def smaller_micro_batch(job: FinetuneJob) -> FinetuneJob | None:
    """Return the same fine-tune with half the micro-batch; None if it is one image already.

    The gradients of a batch are summed over its parts, so only the last bits of a sum change.
    """
    share = job.train.batch_size // job.num_workers
    size = min(job.train.micro_batch_size or share, share)
    if size == 1:
        return None
    return replace(job, train=replace(job.train, micro_batch_size=-(-size // 2)))


def short_finetune(job: FinetuneJob, report: Report) -> ShortFinetuneResult | None:
    """Fine-tune a candidate for a few steps, or some more, and measure its loss.

    A candidate whose training diverges has an infinite loss: the others go on without it.
    """
    started = time.perf_counter()
    base = load_base(job.context, job.group)
    try:
        state = _tune(base, job, report)
        if worker_rank().rank != 0:
            return None
        with state.ema_weights(job.train.average_with_start) as averaged:
            loss = held_out_loss(averaged, job.context, job.group, base.schedule)
    except NonFiniteLossError as error:
        logger.warning("%s: %s", job.checkpoint.stem, error)
        loss = math.inf
    each = macs_per_image(job.train, base.space.macs(widths_of(job.kept)), base.space.macs_base)
    return ShortFinetuneResult(loss, each * job.num_images, time.perf_counter() - started)


def finetune_item(
    search: GroupSearch, kept: KeptIndices, train: FinetuneConfig, compute: ComputeConfig
) -> WorkItem[FinetuneJob, FinetuneResult]:
    """Create the item that fine-tunes a group's sub-model and saves it as the group's expert."""
    job = _job(search, "finetune", kept, train, compute, 0)
    expert = search.context.run_dir.expert(search.group.index)
    item = _item(search, "finetune", finetune_expert, job, FinetuneResult, compute)
    return replace(item, inputs=finetune_inputs, files=(expert,))


def short_finetune_item(
    search: GroupSearch,
    name: str,
    kept: KeptIndices,
    train: FinetuneConfig,
    compute: ComputeConfig,
    steps_before: int = 0,
) -> WorkItem[FinetuneJob, ShortFinetuneResult]:
    """Create the item that fine-tunes a sub-model for some steps and measures it.

    Args:
        search: The group's search.
        name: Its purpose; files are named by this and by what is kept.
        kept: What of each unit is kept.
        train: How to train, and for how many steps in all.
        compute: The workers.
        steps_before: How many of the steps an earlier item of this name did.
    """
    job = _job(search, name, kept, train, compute, steps_before)
    name = f"{name}-{train.num_steps}"
    item = _item(search, name, short_finetune, job, ShortFinetuneResult, compute)
    # a longer one resumes from the checkpoint
    return replace(item, inputs=short_finetune_inputs, files=(job.checkpoint,))


def _item(
    search: GroupSearch,
    name: str,
    function: Callable[[FinetuneJob, Report], R | None],
    job: FinetuneJob,
    result_type: type[R],
    compute: ComputeConfig,
) -> WorkItem[FinetuneJob, R]:
    """Create an item for actors that train: one, or several, data parallel."""
    space = search.space
    each = macs_per_image(job.train, space.macs(widths_of(job.kept)), space.macs_base)
    return WorkItem(
        key=search.key(name),
        function=function,
        job=job,
        result_path=search.result_path(name, job.kept),
        result_type=result_type,
        cost=each * job.num_images,
        cost_behind=search.cost_behind(),
        num_steps=job.train.num_steps,
        resources=actor_resources(compute),
        num_workers=compute.workers_per_finetune,
        reduce_memory=smaller_micro_batch,
    )


def _job(
    search: GroupSearch,
    name: str,
    kept: KeptIndices,
    train: FinetuneConfig,
    compute: ComputeConfig,
    steps_before: int,
) -> FinetuneJob:
    checkpoint = search.result_path(name, kept).with_suffix(".pt")
    num_workers = compute.workers_per_finetune
    return FinetuneJob(
        search.context, search.group, kept, train, num_workers, checkpoint, steps_before
    )


def _tune(base: LoadedBase, job: FinetuneJob, report: Report) -> TrainState:
    """Prune and refit the base, and train the sub-model, or resume from its checkpoint."""
    resumes = exists(job.checkpoint)  # its weights replace those of a refit
    unet = (
        family_of(base.network).cut(base.network, base.space.units, job.kept)
        if resumes
        else prune_and_refit(base, job.kept).network
    )
    state = start_state(unet, job.train, keep_start=job.train.average_with_start > 0)
    if resumes:
        state.load(job.checkpoint)
    elif job.train.optimizer_state == "base":
        _adopt_moments(state, base, job)
    if len(set(steps := all_gather(state.step))) > 1:  # on NFS one may see an older file
        raise StorageFailedError(
            f"the workers of one fine-tune see {display_path(job.checkpoint)} at the steps "
            f"{steps}."
        )
    _train(state, base, job, report)
    return state


def _adopt_moments(state: TrainState, base: LoadedBase, job: FinetuneJob) -> None:
    checkpoint, family = job.context.base_checkpoint, family_of(base.network)
    if checkpoint is None:
        raise CheckpointError(NO_BASE_CHECKPOINT)
    adopt_moments(
        state,
        checkpoint,
        base.network,
        lambda network: family.cut(network, base.space.units, job.kept),
    )


def _train(state: TrainState, base: LoadedBase, job: FinetuneJob, report: Report) -> None:
    context, group, rank = job.context, job.group, worker_rank()
    seed_parts = ("finetune", group.first, group.last)
    model: nn.Module = state.unet
    if rank.world_size > 1:
        model = data_parallel(state.unet, job.kept)
    dataset = context.data.open()
    indices, _ = held_out_split(dataset, context.prune.held_out_share, context.seed)
    images = batches(
        dataset,
        indices=indices,
        batch_size=job.train.batch_size,
        seed=derive_seed(context.seed, *seed_parts, "order"),
        start_step=state.step,
        num_steps=job.train.num_steps,
        rank=rank.rank,
        world_size=rank.world_size,
        num_workers=context.data.data.num_workers,
    )
    train(
        state,
        model,
        images,
        base.schedule,
        job.train,
        context.data.data,
        timesteps=with_margin(
            group.timesteps, job.train.timestep_margin, base.schedule.num_train_timesteps
        ),
        seed=derive_seed(context.seed, *seed_parts),
        rank=rank.rank,
        label_dropout=context.conditioning.label_dropout,
        caption_dropout=context.data.caption_dropout(context.conditioning.caption_dropout),
        teacher=Teacher(base.network, share) if (share := job.train.distillation_share) else None,
        report=report,
        save=lambda current: current.save(job.checkpoint),
    )


def data_parallel(unet: nn.Module, kept: KeptIndices) -> nn.Module:
    """Wrap a sub-model for data-parallel training.

    Where branches were removed, nothing may read some weights, such as those of the caption's
    stream after the last joint attention that is left: they get no gradient.
    """
    removed = not all(kept.values())
    return nn.parallel.DistributedDataParallel(unet, find_unused_parameters=removed)


def with_margin(timesteps: range, margin: float, num_train_timesteps: int) -> range:
    """Widen a range of timesteps by a share of their number on either side."""
    beyond = round(margin * len(timesteps))
    first, end = timesteps.start - beyond, timesteps.stop + beyond
    return range(max(0, first), min(num_train_timesteps, end))

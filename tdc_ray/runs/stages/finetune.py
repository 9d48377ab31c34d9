"""Stage 2's second half: fine-tunes a pruned expert on its group's timesteps (TDC Eq. 8)."""

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import batches, held_out_split
from tdc_ray.data.fingerprint import data_key, training_key
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.errors import NonFiniteLossError, StorageFailedError
from tdc_ray.execution.device import all_gather, worker_rank
from tdc_ray.execution.item import AnyItem, Inputs, Report, Resources, Result
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import count_params, unet_config
from tdc_ray.models.units import KeptIndices, kept_digest, widths_of
from tdc_ray.pruning.fingerprint import measuring_key, timesteps_key
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.loaded_base import LoadedBase, load_base, pruned_unet
from tdc_ray.pruning.noised import held_out_loss
from tdc_ray.pruning.space import space_of
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import exists
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)


VERSION = 2
"""Changes whenever what a fine-tune comes to does, so that stored ones are made again."""


@dataclass(frozen=True, slots=True)
class FinetuneJob:
    """Fine-tune what is kept of the base on a group's timesteps."""

    run_dir: RunDir
    config: RunConfig
    group: TimestepGroup
    kept: KeptIndices
    checkpoint: Path
    steps_before: int = 0
    """Steps that an earlier item took."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.config.finetune.num_steps

    @property
    def num_images(self) -> int:
        """Images that training sees, those of an earlier item not counted."""
        return (self.num_steps - self.steps_before) * self.config.finetune.batch_size


def finetune_expert(job: FinetuneJob, report: Report) -> Result:
    """Fine-tune, or go on from the checkpoint of an earlier attempt, and save the expert.

    The expert starts from the base's averaged weights, cut and refitted, and is saved with its own
    averaged weights. With no steps to take it is what the refit left.

    Returns:
        ``macs``, ``num_params``, ``loss_finetuned`` (on held-out images and noise),
        ``train_steps``, ``train_macs`` (three forward passes per image seen) and ``seconds`` of
        this attempt.

    Raises:
        NonFiniteLossError: Training diverged.
        CheckpointError: The base or the checkpoint cannot be read.
    """
    started = time.perf_counter()
    base, state = _tune(job, report)
    if worker_rank().rank != 0:
        return {}
    with state.averaged() as averaged:
        save_expert(
            job.run_dir.expert(job.group.index),
            averaged,
            unet_config(job.run_dir.base_unet),
            job.kept,
        )
        loss = held_out_loss(averaged, job.config, job.group)
    macs = base.space.macs(widths_of(job.kept))
    return {
        "macs": macs,
        "num_params": count_params(state.unet),
        "loss_finetuned": loss,
        "train_steps": job.num_steps,
        "train_macs": 3.0 * macs * job.num_images,
        "seconds": time.perf_counter() - started,
    }


def finetune_inputs(job: FinetuneJob) -> Inputs:
    """Give what a fine-tune, and a short one, follows from."""
    return {
        "stage": "finetune",
        "version": VERSION,
        "base": weights_digest(job.run_dir.base_unet),
        "kept": job.kept,
        "workers": job.config.compute.workers_per_finetune,
        **data_key(
            training_data(job.config.data, job.config.evaluate.cache_dir),
            seed=job.config.seed,
            diffusion=job.config.diffusion,
            conditioning=job.config.conditioning,
            tf32=job.config.compute.tf32,
        ),
        **timesteps_key(job.group),
        **measuring_key(job.config.prune),
        **training_key(job.config.finetune),
    }


def short_finetune_inputs(job: FinetuneJob) -> Inputs:
    """Give what :func:`short_finetune` follows from: it leaves another result than a fine-tune."""
    return {**finetune_inputs(job), "stage": "try", "steps_before": job.steps_before}


def smaller_micro_batch(job: FinetuneJob) -> FinetuneJob | None:
    """Give the same fine-tune with half the images at once; None: it is down to one.

    The gradients of a batch are summed over its parts, so only the last bits of a sum change.
    """
    train_config = job.config.finetune
    share = train_config.batch_size // job.config.compute.workers_per_finetune
    size = min(train_config.micro_batch_size or share, share)
    if size == 1:
        return None
    smaller = replace(train_config, micro_batch_size=-(-size // 2))
    return replace(job, config=replace(job.config, finetune=smaller))


def short_finetune(job: FinetuneJob, report: Report) -> Result:
    """Fine-tune a candidate for a few steps, or some more; give ``loss``, ``macs``, ``seconds``.

    A candidate whose training diverges has an infinite loss: the others go on without it.
    """
    started = time.perf_counter()
    try:
        _, state = _tune(job, report)
        if worker_rank().rank != 0:
            return {}
        with state.averaged() as averaged:
            loss = held_out_loss(averaged, job.config, job.group)
    except NonFiniteLossError as error:
        logger.warning("%s: %s", job.checkpoint.stem, error)
        loss = math.inf
    space = space_of(unet_config(job.run_dir.base_unet), job.config.prune.space)
    macs = 3.0 * space.macs(widths_of(job.kept)) * job.num_images
    return {"loss": loss, "macs": macs, "seconds": time.perf_counter() - started}


def finetune_item(task: GroupSearch, kept: KeptIndices) -> AnyItem:
    """Make the item that fine-tunes a group's sub-model and saves it as the group's expert."""
    job = _job(task, kept, task.config.finetune.num_steps, f"finetune-{kept_digest(kept)}.pt")
    macs = task.space.macs(widths_of(kept))
    item = task.item(
        "finetune",
        finetune_expert,
        job,
        cost=3.0 * macs * job.num_images,
        num_steps=job.num_steps,
        kept=kept,
        inputs=finetune_inputs,
        files=(task.run_dir.expert(task.group.index),),
    )
    return _as_training(item, task.config)


def short_finetune_item(
    task: GroupSearch, name: str, kept: KeptIndices, num_steps: int, steps_before: int = 0
) -> AnyItem:
    """Make the item that fine-tunes a sub-model for some steps and measures it, nothing more.

    Args:
        task: The group.
        name: What it is tried for; its files are named after that and what is kept.
        kept: What of each unit is kept.
        num_steps: Optimizer steps in all.
        steps_before: How many of them an earlier item of this name took.
    """
    job = _job(task, kept, num_steps, f"{name}-{kept_digest(kept)}.pt", steps_before)
    macs = task.space.macs(widths_of(kept))
    item = task.item(
        f"{name}-{num_steps}",
        short_finetune,
        job,
        cost=3.0 * macs * job.num_images,
        num_steps=num_steps,
        kept=kept,
        inputs=short_finetune_inputs,
        files=(job.checkpoint,),  # which a longer one goes on from
    )
    return _as_training(item, task.config)


def _as_training(item: AnyItem, config: RunConfig) -> AnyItem:
    """Give an item what a fine-tune takes: an actor that trains, or several, data parallel."""
    compute = config.compute
    return replace(
        item,
        resources=Resources(compute.cpus_per_actor, compute.gpus_per_actor),
        num_workers=compute.workers_per_finetune,
        reduce_memory=smaller_micro_batch,
    )


def _job(
    task: GroupSearch, kept: KeptIndices, num_steps: int, checkpoint: str, steps_before: int = 0
) -> FinetuneJob:
    config = task.config
    shorter = replace(config, finetune=replace(config.finetune, num_steps=num_steps))
    folder = task.run_dir.group(task.group.index)
    return FinetuneJob(task.run_dir, shorter, task.group, kept, folder / checkpoint, steps_before)


def _tune(job: FinetuneJob, report: Report) -> tuple[LoadedBase, TrainState]:
    """Cut and refit the base, and train what is left, or go on from a checkpoint of it."""
    base = load_base(job.run_dir, job.config)
    goes_on = exists(job.checkpoint)  # its weights replace those of a refit
    unet = (
        cut(base.unet, base.space.units, job.kept)
        if goes_on
        else pruned_unet(base, job.kept, job.config, job.group)
    )
    state = start_state(unet, job.config.finetune)
    if goes_on:
        state.load(job.checkpoint)
    if len(set(steps := all_gather(state.step))) > 1:  # on NFS one may see an older file
        raise StorageFailedError(
            f"the workers of one fine-tune see {display_path(job.checkpoint)} at the steps "
            f"{steps}."
        )
    _train(state, job.config, job.group, job.checkpoint, report)
    return base, state


def _train(
    state: TrainState, config: RunConfig, group: TimestepGroup, checkpoint: Path, report: Report
) -> None:
    name, here = ("finetune", group.first, group.last), worker_rank()
    model: nn.Module = state.unet
    if here.world_size > 1:
        model = nn.parallel.DistributedDataParallel(state.unet)
    dataset = training_data(config.data, config.evaluate.cache_dir).open()
    indices, _ = held_out_split(dataset, config.prune.held_out_share, config.seed)
    images = batches(
        dataset,
        indices=indices,
        batch_size=config.finetune.batch_size,
        seed=derive_seed(config.seed, *name, "order"),
        start_step=state.step,
        num_steps=config.finetune.num_steps,
        rank=here.rank,
        world_size=here.world_size,
        num_workers=config.data.num_workers,
    )
    train(
        state,
        model,
        images,
        noise_schedule(config.diffusion).to(state.device),
        config.finetune,
        config.data,
        timesteps=group.timesteps,
        seed=derive_seed(config.seed, *name),
        rank=here.rank,
        label_dropout=config.conditioning.label_dropout,
        report=report,
        save=lambda current: current.save(checkpoint) if here.rank == 0 else None,
    )

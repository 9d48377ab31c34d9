"""Stage 2's second half: fine-tunes a pruned expert on its group's timesteps (TDC Eq. 8)."""

import time
from dataclasses import dataclass
from pathlib import Path

from tdc_ray.config import RunConfig
from tdc_ray.data import batches
from tdc_ray.datasets import load_dataset
from tdc_ray.device import worker_device
from tdc_ray.diffusion import noise_schedule
from tdc_ray.layout import RunDir
from tdc_ray.models.experts import save_expert
from tdc_ray.models.surgery import cut
from tdc_ray.models.unet import count_params, load_unet, unet_config
from tdc_ray.models.units import Kept, units_of
from tdc_ray.plan import Group
from tdc_ray.prune.measure import held_out_loss
from tdc_ray.prune.memory import MemoryBank
from tdc_ray.prune.rounds import Choice, GroupTask, search
from tdc_ray.prune.space import space_of
from tdc_ray.seeds import derive_seed
from tdc_ray.training import TrainState, start_state, train
from tdc_ray.work import Chain, Report, Result, WorkItem


@dataclass(frozen=True, slots=True)
class FinetuneJob:
    """Fine-tune what is kept of the base on a group's timesteps."""

    run_dir: RunDir
    config: RunConfig
    group: Group
    kept: Kept


@dataclass(frozen=True, slots=True)
class Expert:
    """A finished expert."""

    group: Group
    max_macs: int
    choice: Choice
    macs: int
    num_params: int
    loss_finetuned: float
    train_steps: int
    train_macs: float
    seconds: float


def expert_dir(run_dir: RunDir, group: Group) -> Path:
    """Where a group's expert is saved."""
    return run_dir.experts / f"expert-{group.index:02d}"


def make_expert(task: GroupTask, memory: MemoryBank) -> Chain[Expert]:
    """Find a group's sub-model, then fine-tune it: the group's chain of work items."""
    choice = yield from search(task, memory)
    (tuned,) = yield [_item(task, choice)]
    _checkpoint(task.run_dir, task.group).unlink(missing_ok=True)  # its result exists now
    return Expert(
        group=task.group,
        max_macs=task.max_macs,
        choice=choice,
        macs=tuned["macs"],
        num_params=tuned["num_params"],
        loss_finetuned=tuned["loss_finetuned"],
        train_steps=tuned["train_steps"],
        train_macs=tuned["train_macs"],
        seconds=tuned["seconds"],
    )


def finetune_expert(job: FinetuneJob, report: Report) -> Result:
    """Fine-tune, or go on from the checkpoint of an earlier attempt, and save the expert.

    The expert starts from the base's averaged weights and is saved with its own averaged weights.

    Returns:
        ``macs``, ``num_params``, ``loss_finetuned`` (on held-out noise), ``train_steps``,
        ``train_macs`` (three forward passes per image seen) and ``seconds`` of this attempt.

    Raises:
        NonFiniteLossError: Training diverged.
        CheckpointError: The base or the checkpoint cannot be read.
    """
    started = time.perf_counter()
    config, group = job.config, job.group
    base_config = unet_config(job.run_dir.base_unet)
    unet = cut(load_unet(job.run_dir.base_unet), units_of(base_config), job.kept)
    state = start_state(unet.to(worker_device()), config.finetune)
    checkpoint = _checkpoint(job.run_dir, group)
    if checkpoint.exists():
        state.load(checkpoint)
    _train(state, config, group, checkpoint, report)
    with state.averaged() as averaged:
        save_expert(expert_dir(job.run_dir, group), averaged, base_config, job.kept)
        loss = held_out_loss(averaged, config, group)
    space = space_of(base_config)
    macs = space.macs({name: len(places) for name, places in job.kept.items()})
    num_steps = config.finetune.num_steps
    return {
        "macs": macs,
        "num_params": count_params(unet),
        "loss_finetuned": loss,
        "train_steps": num_steps,
        "train_macs": 3.0 * macs * num_steps * config.finetune.batch_size,
        "seconds": time.perf_counter() - started,
    }


def _checkpoint(run_dir: RunDir, group: Group) -> Path:
    return run_dir.group(group.index) / "checkpoint.pt"


def _train(
    state: TrainState, config: RunConfig, group: Group, checkpoint: Path, report: Report
) -> None:
    name = ("finetune", group.first, group.last)
    images = batches(
        load_dataset(config.data),
        batch_size=config.finetune.batch_size,
        seed=derive_seed(config.seed, *name, "order"),
        start_step=state.step,
        num_steps=config.finetune.num_steps,
        num_workers=config.data.num_workers,
    )
    train(
        state,
        state.unet,
        images,
        noise_schedule(config.diffusion).to(state.device),
        config.finetune,
        config.data,
        timesteps=group.timesteps,
        seed=derive_seed(config.seed, *name),
        report=report,
        save=lambda current: current.save(checkpoint),
    )


def _item(task: GroupTask, choice: Choice) -> WorkItem:
    macs = task.space.macs(choice.widths)
    train_config = task.config.finetune
    return WorkItem(
        key=f"{task.name}/finetune",
        function=finetune_expert,
        job=FinetuneJob(task.run_dir, task.config, task.group, choice.kept),
        result_path=task.run_dir.group(task.group.index) / "finetune.json",
        cost=3.0 * macs * train_config.num_steps * train_config.batch_size,
        num_steps=train_config.num_steps,
    )

"""Stage 2 of one group as a chain of work items: search, successive halving, fine-tune."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import FinetuneConfig
from tdc_ray.data.latents import TrainingData, training_data
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.chain import Chain, result_of, results_of
from tdc_ray.models.units import KeptIndices
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.result import SearchResult
from tdc_ray.pruning.search import search_submodel
from tdc_ray.runs.results import GroupResult
from tdc_ray.runs.stages.finetune import FinetuneResult, finetune_item, short_finetune_item
from tdc_ray.storage.files import listing, remove
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Expert:
    """A finished expert."""

    group: TimestepGroup
    max_macs: int
    search_result: SearchResult
    macs: int
    num_params: int
    loss_finetuned: float
    train_steps: int
    train_macs: float
    seconds: float
    nanoseconds: int | None
    """Time of a forward pass, by the table of the units' times; None where macs are limited."""

    max_nanoseconds: int | None


def pruning_context(
    run_dir: RunDir,
    config: RunConfig,
    data: TrainingData | None = None,
    base_checkpoint: Path | None = None,
    *,
    models_all_groups: bool = False,
) -> PruningContext:
    """Create the settings that the searches of a run's groups have in common.

    Args:
        run_dir: The run.
        config: Its settings.
        data: The data that its denoisers are trained on, where known.
        base_checkpoint: Stage 1's last, for fine-tunes that begin with its moments.
        models_all_groups: Budgets are shared by quadratic models of all groups.
    """
    train = config.finetune
    return PruningContext(
        run_dir=run_dir,
        seed=config.seed,
        data=data or training_data(config.data, config.evaluate.cache_dir),
        diffusion=config.diffusion,
        conditioning=config.conditioning,
        prune=config.prune,
        proxy=config.proxy,
        tf32=config.compute.tf32,
        models_all_groups=models_all_groups,
        work_after=3.0 * train.num_steps * train.batch_size,  # forward and backward count three
        base_checkpoint=base_checkpoint,
    )


def make_expert(
    search: GroupSearch, memory: MemoryBank, train: FinetuneConfig, compute: ComputeConfig
) -> Chain[Expert]:
    """Find a group's sub-model, then fine-tune it: the group's chain of work items."""
    result = yield from search_submodel(search, memory)
    if search.context.prune.halving_steps and result.candidates:
        result = yield from _successive_halving(search, result, memory, train, compute)
    tuned = yield from finetune_and_save(search, result.kept, train, compute)
    return Expert(
        group=search.group,
        max_macs=search.max_macs,
        search_result=result,
        macs=tuned.macs,
        num_params=tuned.num_params,
        loss_finetuned=tuned.loss_finetuned,
        train_steps=tuned.train_steps,
        train_macs=tuned.train_macs,
        seconds=tuned.seconds,
        nanoseconds=search.space.nanoseconds(result.widths),
        max_nanoseconds=search.limit if search.space.quantity == "time" else None,
    )


def finetune_and_save(
    search: GroupSearch, kept: KeptIndices, train: FinetuneConfig, compute: ComputeConfig
) -> Chain[FinetuneResult]:
    """Fine-tune a group's sub-model, for any number of steps, and save it as the expert."""
    item = finetune_item(search, kept, train, compute)
    for other in listing(item.result_path.parent, "finetune-*.json"):
        if other != item.result_path:  # of another sub-model, whose expert this one will replace
            remove(other)
    tuned = yield from result_of(item)
    remove(item.job.checkpoint)  # its result exists now
    return tuned


def group_result(expert: Expert, macs_base: int) -> GroupResult:
    """Return what results say of an expert.

    Args:
        expert: The expert.
        macs_base: Macs of the base.
    """
    limit, nanoseconds = expert.max_nanoseconds, expert.nanoseconds
    return GroupResult(
        index=expert.group.index,
        timesteps=(expert.group.first, expert.group.last),
        macs_limit=expert.max_macs if limit is None else macs_base,
        macs=expert.macs,
        num_params=expert.num_params,
        widths=expert.search_result.widths,
        loss_base=expert.search_result.loss_base,
        loss_cut=expert.search_result.loss_cut,
        loss_refit=expert.search_result.loss_refit,
        loss_finetuned=expert.loss_finetuned,
        source="base" if expert.search_result.entry is None else expert.search_result.entry.source,
        milliseconds_limit=None if limit is None else limit / 1e6,
        milliseconds=None if nanoseconds is None else nanoseconds / 1e6,
        train_steps=expert.train_steps,
    )


def _successive_halving(
    search: GroupSearch,
    result: SearchResult,
    memory: MemoryBank,
    train: FinetuneConfig,
    compute: ComputeConfig,
) -> Chain[SearchResult]:
    """Train the better half of the candidates, then the better half of these for longer, etc.

    Jamieson and Talwalkar, arXiv:1502.07943. A candidate that is kept resumes from its checkpoint.
    """
    candidates = list(result.candidates[: (len(result.candidates) + 1) // 2])
    steps, before = search.context.prune.halving_steps, 0
    while len(candidates) > 1:
        # The better ones go on from there, so the learning rate may not have fallen to 0.
        longer = replace(train, num_steps=steps, lr_schedule="constant")
        items = [
            short_finetune_item(
                search, "try-{1}-{2}".format(*one.entry.key), one.kept, longer, compute, before
            )
            for one in candidates
        ]
        tuned = yield from results_of(items)
        losses = {}
        for candidate, short in zip(candidates, tuned, strict=True):
            memory.set_tuned_loss(candidate.entry.key, short.loss)
            losses[candidate.entry.key] = short.loss
            result.cost.add(short.macs, short.seconds)
        candidates.sort(key=lambda one: (math.isnan(losses[one.entry.key]), losses[one.entry.key]))
        candidates = candidates[: (len(candidates) + 1) // 2]
        steps, before = 2 * steps, steps
    for checkpoint in listing(search.folder, "try-*.pt"):
        remove(checkpoint)
    return replace(result, kept=candidates[0].kept, entry=candidates[0].entry)

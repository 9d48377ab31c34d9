"""Stage 2 of one group as a chain of work items: search, successive halving, fine-tune."""

import math
from dataclasses import dataclass, replace

from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.chain import Chain
from tdc_ray.pruning.group import GroupSearch, SearchResult
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.search import search
from tdc_ray.runs.stages.finetune import finetune_item, short_finetune_item
from tdc_ray.storage.files import listing, remove


@dataclass(frozen=True, slots=True)
class Expert:
    """A finished expert."""

    group: TimestepGroup
    max_macs: int
    choice: SearchResult
    macs: int
    num_params: int
    loss_finetuned: float
    train_steps: int
    train_macs: float
    seconds: float
    nanoseconds: int | None
    """Of a forward pass, by the table of what the units take; None where macs are limited."""

    max_nanoseconds: int | None


def make_expert(task: GroupSearch, memory: MemoryBank) -> Chain[Expert]:
    """Find a group's sub-model, then fine-tune it: the group's chain of work items."""
    choice = yield from search(task, memory)
    if task.config.prune.halving_steps and choice.candidates:
        choice = yield from _halve(task, choice, memory)
    item = finetune_item(task, choice.kept)
    for other in listing(item.result_path.parent, "finetune-*.json"):
        if other != item.result_path:  # of another choice, whose expert this one's will replace
            remove(other)
    (tuned,) = yield [item]
    remove(item.job.checkpoint)  # its result exists now
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
        nanoseconds=task.space.nanoseconds(choice.widths),
        max_nanoseconds=task.limit if task.space.quantity == "time" else None,
    )


def _halve(task: GroupSearch, choice: SearchResult, memory: MemoryBank) -> Chain[SearchResult]:
    """Train the better half of the candidates, then the better half of those for longer, and on.

    Successive halving: Jamieson and Talwalkar, arXiv:1502.07943. A candidate that goes on does so
    from where it was.
    """
    left = list(choice.candidates[: (len(choice.candidates) + 1) // 2])
    steps, before = task.config.prune.halving_steps, 0
    while len(left) > 1:
        items = [
            short_finetune_item(
                task, "try-{1}-{2}".format(*one.entry.place), one.kept, steps, before
            )
            for one in left
        ]
        results = yield items
        losses = {}
        for candidate, result in zip(left, results, strict=True):
            memory.add_tuned(candidate.entry.place, result["loss"])
            losses[candidate.entry.place] = result["loss"]
            choice.spent.add(result)
        left.sort(key=lambda one: (math.isnan(losses[one.entry.place]), losses[one.entry.place]))
        left = left[: (len(left) + 1) // 2]
        steps, before = 2 * steps, steps
    for checkpoint in listing(task.run_dir.group(task.group.index), "try-*.pt"):
        remove(checkpoint)
    return replace(choice, kept=left[0].kept, entry=left[0].entry)

"""The work items of a group's search: scores, sensitivities and losses, each for any worker."""

from dataclasses import replace

from tdc_ray.execution.item import AnyItem
from tdc_ray.models.units import KeptIndices, keep_everything, widths_of
from tdc_ray.pruning.criteria.scores import Scores
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.jobs import (
    MeasureJob,
    SensitivityJob,
    StreamJob,
    measure_inputs,
    sensitivity_inputs,
    stream_inputs,
)
from tdc_ray.pruning.loaded_base import measure_candidate, measure_sensitivities, measure_stream

SENSITIVITY_ITEMS = 4
"""Items that a group's sensitivities are cut into, so that several workers share them."""


def sensitivity_items(
    task: GroupSearch, number: int, kept: KeptIndices, scores: Scores, loss: float, num_shares: int
) -> list[AnyItem]:
    """Make a pass's items: inner units in some shares, and every stream by itself.

    Args:
        task: The group.
        number: The pass.
        kept: What the model that is measured keeps of the base.
        scores: Of the base's units.
        loss: Of that model.
        num_shares: Items for the inner units; each runs the images through the whole model.
    """
    prune, where = task.config.prune, (task.run_dir, task.config, task.group)
    left = [unit for unit in task.space.units if len(kept[unit.name]) > 1]
    inner = [unit.name for unit in left if unit.kind != "stream"]
    macs, behind = task.space.macs(widths_of(kept)), _candidates_macs(task, 0)
    items: list[AnyItem] = []
    for place in range(num_shares):
        if names := tuple(inner[place::num_shares]):
            passes = (
                3 * prune.num_refit_images + len(names) * prune.num_levels * prune.num_images / 2
            )
            job = SensitivityJob(*where, names, kept, scores)
            name = f"sensitivities-{number}-{place}"
            items.append(
                task.item(
                    name,
                    measure_sensitivities,
                    job,
                    cost=passes * macs,
                    behind=behind,
                    inputs=sensitivity_inputs,
                )
            )
    for place, unit in enumerate(unit for unit in left if unit.kind == "stream"):
        passes = prune.num_levels * (prune.num_images + 3 * prune.num_refit_images)
        stream = StreamJob(*where, unit.name, kept, scores, loss)
        name = f"sensitivities-{number}-stream-{place}"
        cost = passes * macs
        items.append(
            task.item(name, measure_stream, stream, cost=cost, behind=behind, inputs=stream_inputs)
        )
    return items


def measure_item(task: GroupSearch, name: str, kept: KeptIndices, number: int) -> AnyItem:
    """Make the item that cuts, refits and measures a sub-model.

    Args:
        task: The group.
        name: Its name within the group.
        kept: What of each unit is kept.
        number: Which of the search's candidates it is, counted from 1; 0: none of them.
    """
    prune, macs = task.config.prune, task.space.macs(widths_of(kept))
    refitted = prune.refit != "none" and macs < task.space.macs_base
    images = prune.num_images + 3 * prune.num_refit_images * refitted
    return task.item(
        name,
        measure_candidate,
        MeasureJob(task.run_dir, task.config, task.group, kept, number),
        cost=float(images * macs),
        behind=_candidates_macs(task, number),
        num_steps=max(number, 1),
        kept=kept,
        inputs=measure_inputs,
    )


def base_item(task: GroupSearch) -> AnyItem:
    """Make the item that measures the base, and leaves what the group's refits need of it."""
    item, prune = (
        measure_item(task, "base", keep_everything(task.space.units), 0),
        task.config.prune,
    )
    if prune.refit == "none" or prune.method == "none" or task.max_macs >= task.space.macs_base:
        return item
    weighing = 3.0 * prune.num_refit_images * task.space.macs_base
    return replace(
        item,
        job=replace(item.job, leaves_weights=True),
        cost=item.cost + weighing,
        files=(task.run_dir.error_weights(task.group.index),),
    )


def _candidates_macs(task: GroupSearch, number: int) -> float:
    """Macs, roughly, of measuring all candidates that come after one."""
    prune = task.config.prune
    images = prune.num_images + 3 * prune.num_refit_images * (prune.refit != "none")
    return float((prune.num_rounds * prune.num_candidates - number) * images * task.max_macs)

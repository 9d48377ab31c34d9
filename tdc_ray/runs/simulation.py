"""What stage 2 would take on a cluster of any size: its very items, in simulated time."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from tdc_ray.config.run import RunConfig, differences, from_json
from tdc_ray.config.simulation import SimulationConfig
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.errors import StorageError
from tdc_ray.execution.chain import Barrier, Chain
from tdc_ray.execution.item import AnyItem
from tdc_ray.execution.simulator import FailureModel, SimulationResult, simulate
from tdc_ray.execution.timeline import load_history
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.units import KeptIndices, keep_everything
from tdc_ray.pruning.group import GroupSearch, group_tasks
from tdc_ray.pruning.proxies.by_score import uniform_scheme
from tdc_ray.pruning.space import Space, space_of
from tdc_ray.pruning.tasks.candidates import (
    SENSITIVITY_ITEMS,
    base_item,
    measure_item,
    sensitivity_items,
)
from tdc_ray.runs.stages.finetune import finetune_item, short_finetune_item
from tdc_ray.storage.files import read_json
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir

NO_RUN_DIR = RunDir(Path("/nonexistent/tdc-ray-rehearsal"))
"""Where no item has a result."""


def simulate_run(config: RunConfig, simulation: SimulationConfig) -> list[SimulationResult]:
    """Simulate stage 2 of a run, or of several side by side, for every number of workers.

    Raises:
        LimitError: A group's limit is below the smallest pruned model.
        StorageError: The run that is to give the costs has no timeline, or other settings.
    """
    seconds_of, train, groups = _costs(config, simulation), config.finetune, _groups(config)
    weather = FailureModel(
        failures_per_hour=simulation.failures_per_hour,
        joins_per_hour=simulation.joins_per_hour,
        seed=simulation.simulation_seed,
    )

    def checkpoint_every_s(item: AnyItem) -> float | None:
        if not item.key.endswith("/finetune"):
            return None
        return seconds_of(item) * min(1.0, train.checkpoint_every / max(1, train.num_steps))

    return [
        simulate(
            {
                f"trial-{trial}/{task.name}": _dry_run(task, stages, f"trial-{trial}/")
                for trial in range(simulation.trials)
                for task, stages in groups
            },
            seconds_of,
            num_workers=num_workers,
            weather=weather,
            checkpoint_every_s=checkpoint_every_s,
            max_attempts=config.compute.max_attempts,
        )
        for num_workers in simulation.workers
    ]


def _costs(config: RunConfig, simulation: SimulationConfig) -> Callable[[AnyItem], float]:
    """Give what an item takes: as measured, or by its macs."""
    measured: dict[str, float] = {}
    if simulation.costs is not None:
        run_dir = RunDir(resolve_path(simulation.costs))
        timeline, spans = run_dir.timeline, defaultdict(list)
        for span in load_history(timeline).spans:
            if span.outcome == "done" and span.ended is not None:
                spans[span.item].append(span.ended - span.started)
        if not spans:
            raise StorageError(
                f"{display_path(timeline)} has no finished item: name a run that is further."
            )
        changed = differences(from_json(read_json(run_dir.config)), config)
        if changed:
            raise StorageError(
                f"--costs {display_path(run_dir.root)} has other settings: {'; '.join(changed)}. "
                "Leave them as that run's are, or leave --costs out: times then follow from macs."
            )
        measured = {item: mean(seconds) for item, seconds in spans.items()}
    return lambda item: measured.get(
        item.key, item.cost / (simulation.macs_per_second * item.num_workers)
    )


_Stage = list[AnyItem] | Barrier


def _groups(config: RunConfig) -> list[tuple[GroupSearch, list[_Stage]]]:
    """Give what every group does.

    Scores and calls to a language model are left out: they take no worker, or not for long.
    """
    prune = config.prune
    space = space_of(
        base_unet(config.model, config.conditioning), prune.space, prune.channel_multiple
    )
    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    tasks = group_tasks(NO_RUN_DIR, config, space, plan.groups)
    return [(task, _stages(task)) for task in tasks]


def _dry_run(task: GroupSearch, stages: Sequence[_Stage], prefix: str) -> Chain[None]:
    """Go through the stages, on workers that are all alike; groups of one trial meet."""
    participants = frozenset(f"{prefix}{name}" for name in task.participants)
    for stage in stages:
        if isinstance(stage, Barrier):
            yield replace(stage, participants=participants)
        else:
            yield [replace(item, resources=None) for item in stage]


def _stages(task: GroupSearch) -> list[_Stage]:
    prune, space = task.config.prune, task.space
    full = keep_everything(space.units)
    stages: list[_Stage] = [[base_item(task)]]
    if prune.method == "none" or task.max_macs >= space.macs_base:
        return [*stages, [finetune_item(task, full)]]
    cut = _cut_to(space, task.max_macs)
    shared = prune.memory == "shared" and len(task.participants) > 1
    by_proxy = prune.method in ("offline", "llm")
    if by_proxy:
        stages.append(sensitivity_items(task, 0, full, {}, 0.0, SENSITIVITY_ITEMS))
        stages += [
            sensitivity_items(task, number, cut, {}, 0.0, 1)
            for number in range(1, prune.num_passes)
        ]
    for number in range(prune.num_rounds if by_proxy else 1):
        if shared and number > 0 and by_proxy:
            stages.append(Barrier(f"round {number}", task.participants))
        first = 1 + number * prune.num_candidates
        stages.append(
            [
                measure_item(task, f"round-{number}-candidate-{place}", cut, first + place)
                for place in range(prune.num_candidates)
            ]
        )
    steps, before = prune.halving_steps, 0
    left = (prune.num_rounds * prune.num_candidates + 1) // 2 if steps else 1
    while left > 1:
        stages.append(
            [short_finetune_item(task, f"try-{i}", cut, steps, before) for i in range(left)]
        )
        left, steps, before = (left + 1) // 2, 2 * steps, steps
    return [*stages, [finetune_item(task, cut)]]


def _cut_to(space: Space, max_macs: int) -> KeptIndices:
    """Keep the first channels of a scheme that is as large as the limit allows."""
    widths = uniform_scheme(
        space, max_macs, {unit.name: [1.0] * unit.width for unit in space.units}
    )
    return {name: tuple(range(width)) for name, width in widths.items()}

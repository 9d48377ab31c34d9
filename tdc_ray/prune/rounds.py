"""The search for a group's sub-model: propose, fit to the limit, cut, measure, remember."""

from dataclasses import dataclass

from tdc_ray.config import RunConfig
from tdc_ray.layout import RunDir
from tdc_ray.models.units import Kept, keep_all
from tdc_ray.plan import Group
from tdc_ray.prune.importance import keep_best
from tdc_ray.prune.measure import MeasureJob, ScoreJob, measure_candidate, score_units
from tdc_ray.prune.memory import MemoryBank, MemoryEntry, best
from tdc_ray.prune.scored import propose
from tdc_ray.prune.space import Scheme, Space
from tdc_ray.seeds import derive_seed
from tdc_ray.work import Chain, WorkItem


@dataclass(frozen=True, slots=True)
class GroupTask:
    """One group's share of stage 2."""

    run_dir: RunDir
    config: RunConfig
    space: Space
    group: Group

    @property
    def name(self) -> str:
        """Name of the group, in keys and tags."""
        return f"group-{self.group.index:02d}"

    @property
    def max_macs(self) -> int:
        """The limit in macs."""
        return self.group.max_macs(self.space.macs_base)

    @property
    def finetune_macs(self) -> float:
        """Macs that the fine-tune will take at most: forward and backward count three forwards."""
        train = self.config.finetune
        return 3.0 * self.max_macs * train.num_steps * train.batch_size


@dataclass(frozen=True, slots=True)
class Choice:
    """The sub-model that a group's expert starts from."""

    widths: Scheme
    kept: Kept
    loss_base: float
    """Loss of the uncut base on held-out noise of the group's timesteps."""

    loss_cut: float
    """The same of the sub-model, straight after the cut."""

    search_macs: float
    """Macs spent on scores and measurements."""

    seconds: float
    """Time spent on them, on one worker."""


def search(task: GroupTask, memory: MemoryBank) -> Chain[Choice]:
    """Find the sub-model of a group, as a chain of work items.

    Without pruning (``prune.method`` none) it is the base itself.
    """
    config, space, group = task.config, task.space, task.group
    forward = float(config.prune.num_images)
    full = keep_all(space.units)
    (base,) = yield [_measure_item(task, "base", full, 0, config.prune.num_rounds)]
    macs, seconds = forward * space.macs_base, base["seconds"]
    if config.prune.method == "none":
        return Choice(space.full, full, base["loss_cut"], base["loss_cut"], macs, seconds)
    (scored,) = yield [_score_item(task)]
    macs += 3 * forward * space.macs_base if config.prune.method == "taylor" else 0
    seconds += scored["seconds"]
    kept: dict[tuple[int, int, int], Kept] = {}
    for number in range(config.prune.num_rounds):
        candidates = propose(
            space,
            scored["scores"],
            task.max_macs,
            memory.of_group(group.index, before_round=number),
            num_candidates=config.prune.num_candidates,
            seed=derive_seed(config.seed, "propose", group.index, number),
        )
        chosen = [keep_best(space.units, scored["scores"], scheme) for _, scheme in candidates]
        results = yield [
            _measure_item(
                task,
                f"round-{number}-candidate-{place}",
                choice,
                1 + number * config.prune.num_candidates + place,
                config.prune.num_rounds - number - 1,
            )
            for place, choice in enumerate(chosen)
        ]
        for place, (name, scheme) in enumerate(candidates):
            entry = MemoryEntry(
                group=group.index,
                round=number,
                candidate=place,
                source=f"{config.prune.method}/{name}",
                widths=scheme,
                macs=space.macs(scheme),
                num_params=space.num_params(scheme),
                loss_cut=results[place]["loss_cut"],
            )
            memory.add(entry)
            kept[entry.place] = chosen[place]
            macs += forward * entry.macs
            seconds += results[place]["seconds"]
    winner = best(memory.of_group(group.index, before_round=config.prune.num_rounds))
    return Choice(
        winner.widths,
        kept[winner.place],
        base["loss_cut"],
        winner.loss_cut,
        macs,
        seconds,
    )


def _score_item(task: GroupTask) -> WorkItem:
    forward = float(task.config.prune.num_images * task.space.macs_base)
    return WorkItem(
        key=f"{task.name}/scores",
        function=score_units,
        job=ScoreJob(task.run_dir, task.config, task.group),
        result_path=task.run_dir.group(task.group.index) / "scores.json",
        cost=3 * forward,
        cost_behind=_rounds_macs(task, task.config.prune.num_rounds) + task.finetune_macs,
    )


def _measure_item(
    task: GroupTask, name: str, kept: Kept, number: int, rounds_behind: int
) -> WorkItem:
    prune = task.config.prune
    macs = task.space.macs({unit: len(places) for unit, places in kept.items()})
    return WorkItem(
        key=f"{task.name}/{name}",
        function=measure_candidate,
        job=MeasureJob(task.run_dir, task.config, task.group, kept, number),
        result_path=task.run_dir.group(task.group.index) / f"{name}.json",
        cost=float(prune.num_images * macs),
        cost_behind=_rounds_macs(task, rounds_behind) + task.finetune_macs,
        num_steps=max(number, 1),
    )


def _rounds_macs(task: GroupTask, rounds: int) -> float:
    prune = task.config.prune
    return float(rounds * prune.num_candidates * prune.num_images * task.max_macs)

"""The progress of a run, by its directory alone: from any machine that sees the storage."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tdc_ray.config.run import RunConfig, from_json
from tdc_ray.diffusion.plan import TimestepGroup, plan_groups
from tdc_ray.errors import StorageError
from tdc_ray.execution.item import load_result
from tdc_ray.execution.timeline import History, Span, WorkerUsage, load_history, usage
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry, best
from tdc_ray.runs.results import Results, load_results
from tdc_ray.runs.stages.base_result import STEP_FILE, BaseResult
from tdc_ray.storage.files import exists, listing, read_json
from tdc_ray.storage.lease import lease_holder
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStatus:
    """The progress of a group."""

    index: int
    timesteps: tuple[int, int]
    num_candidates: int
    """Schemes that were measured."""

    best_loss: float | None
    """Loss of the best finalist, which results report; while there is none, of the best scheme,
    on fewer images."""

    loss_finetuned: float | None
    """None means that its expert is not finished."""

    failed: str | None
    """Why it failed under the last driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """The progress of a run."""

    config: RunConfig
    driver: str | None
    """The driver that holds the run directory, as far as this machine can see."""

    base: str
    """The progress of stage 1, in words."""

    groups: Sequence[GroupStatus]
    failed: Mapping[str, str]
    """Why parts other than groups, such as samples, failed under the last driver, by name."""

    running: Sequence[Span]
    """Items that the last driver runs, or ran when it died."""

    num_workers: int
    """Workers that it has, or had."""

    usage: Sequence[WorkerUsage]
    results: Results | None
    """None means that the run is not finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartStatus:
    """A run that has no settings yet: they follow once its steps have been timed."""

    driver: str | None
    """As of :class:`RunStatus`; None means that the start ended before there were settings."""

    running: Sequence[Span]
    """Items that the driver runs, or ran when it died."""


def start_status(run_dir: RunDir) -> StartStatus | None:
    """Return how far the start of a run is; None where there are settings, or no run.

    Raises:
        StorageError: A file of it is damaged.
    """
    if exists(run_dir.config):
        return None
    if not exists(run_dir.timeline):  # other folders have leases, too, and refused runs a log
        return None
    driver = lease_holder(run_dir.root)
    return StartStatus(driver=driver, running=_running(load_history(run_dir.timeline)))


def status(run_dir: RunDir) -> RunStatus:
    """Compute the progress of a run.

    Raises:
        StorageError: There is no run, or a file of it is damaged.
    """
    if not exists(run_dir.config):
        raise StorageError(
            f"{display_path(run_dir.root)} is no run directory: it has no {run_dir.config.name}."
        )
    config = from_json(read_json(run_dir.config))
    history = load_history(run_dir.timeline)
    entries = MemoryBank(run_dir.memory).all()
    plan = plan_groups(config.diffusion, config.plan, config.sampler, check_start=False)
    groups = {group.name for group in plan.groups}
    return RunStatus(
        config=config,
        driver=lease_holder(run_dir.root),
        base=_base(run_dir, config),
        groups=[_group(run_dir, group, entries, history) for group in plan.groups],
        failed={name: why for name, why in history.failed.items() if name not in groups},
        running=_running(history),
        num_workers=sum(stay.left is None for stay in history.stays),
        usage=usage(history),
        results=load_results(run_dir.results) if exists(run_dir.results) else None,
    )


def _running(history: History) -> list[Span]:
    return [span for span in history.spans if span.ended is None]


def _base(run_dir: RunDir, config: RunConfig) -> str:
    if exists(run_dir.base_result):
        done = load_result(run_dir.base_result, BaseResult).value
        return f"done: {done.train_steps} steps in {done.seconds:.0f} s"
    kept = listing(run_dir.base_training, "checkpoint_*/*")  # Ray Train has files beside them
    if not kept:
        return f"no checkpoint yet of {config.base.num_steps} steps"
    path = kept[-1].parent / STEP_FILE
    if not exists(path):  # of a version that did not write it
        return f"a checkpoint is kept (one every {config.base.checkpoint_every} steps)"
    return f"step {read_json(path)['step']} of {config.base.num_steps} is kept"


def _group(
    run_dir: RunDir, group: TimestepGroup, entries: Sequence[MemoryEntry], history: History
) -> GroupStatus:
    group_entries = [entry for entry in entries if entry.group == group.index]
    tuned = [read_json(path) for path in listing(run_dir.group(group.index), "finetune-*.json")]
    return GroupStatus(
        index=group.index,
        timesteps=(group.first, group.last),
        num_candidates=len(group_entries),
        best_loss=_best_loss(group_entries),
        loss_finetuned=tuned[0]["loss_finetuned"] if tuned else None,
        failed=history.failed.get(group.name),
    )


def _best_loss(entries: Sequence[MemoryEntry]) -> float | None:
    """Return the loss of the best finalist, or of the best candidate while there is none."""
    finalists = [entry.final for entry in entries if entry.final is not None]
    if finalists:
        return min(finalists, key=lambda final: (math.isnan(final.rank), final.rank)).loss
    return best(list(entries)).loss if entries else None

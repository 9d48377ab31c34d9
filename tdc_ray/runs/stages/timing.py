"""Measures how long the base and every expert take, for what saved macs are worth in time."""

from dataclasses import dataclass
from statistics import median

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import Plan
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.models.timing import device_name, time_passes
from tdc_ray.models.unet2d.unet import load_unet
from tdc_ray.runs.results import TimesResult
from tdc_ray.storage.run_dir import RunDir

MIN_REPEATS, MIN_SECONDS = 9, 0.3
"""Least passes of the base and of an expert, which take turns, and least seconds of these."""


@dataclass(frozen=True, slots=True)
class TimesJob:
    """Time a run's base and its experts."""

    run_dir: RunDir
    config: RunConfig
    plan: Plan


def expert_times(run_dir: RunDir, config: RunConfig, plan: Plan) -> Chain[TimesResult]:
    """Time base and experts, by one worker while no other of the run's is busy, once for a run."""
    item = WorkItem(
        key="times",
        function=measure_experts,
        job=TimesJob(run_dir, config, plan),
        result_path=run_dir.times,
        cost=0.0,
        num_steps=len(plan.groups),
        result_type=TimesResult,
    )
    return (yield from result_of(item))


def measure_experts(job: TimesJob, report: Report) -> TimesResult:
    """Time the base and each expert by turns.

    Every expert is held against passes of the base in between its own; a time is then as if the
    machine had been as fast all along as it was in the middle.
    """
    device, size = worker_device(), job.config.prune.latency_batch_size
    base = load_unet(job.run_dir.base_unet).to(device)
    bases, shares = [], []
    for number, group in enumerate(job.plan.groups, start=1):
        expert = load_expert(job.run_dir.expert(group.index)).to(device)
        whole, part = time_passes(
            [base, expert], size, min_repeats=MIN_REPEATS, min_seconds=MIN_SECONDS
        )
        bases.append(1e3 * whole.total)
        shares.append(part.total / whole.total)
        report({"milliseconds": 1e3 * part.total}, number)
    base_ms = median(bases)
    return TimesResult(
        device=device_name(device),
        batch_size=size,
        base_ms=base_ms,
        experts_ms=tuple(base_ms * share for share in shares),
    )

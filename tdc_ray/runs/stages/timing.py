"""Measures the time of the base and of every expert: the time that saved macs save."""

from dataclasses import dataclass
from statistics import median

from tdc_ray.diffusion.plan import Plan
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.models.families import load_network
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.models.timing import device_name, time_passes
from tdc_ray.runs.results import TimesResult
from tdc_ray.storage.run_dir import RunDir

MIN_REPEATS, MIN_SECONDS = 9, 0.3
"""Fewest passes of the base and of an expert, which alternate, and their fewest seconds."""


@dataclass(frozen=True, slots=True)
class TimesJob:
    """Time a run's base and its experts."""

    run_dir: RunDir
    plan: Plan
    batch_size: int


def expert_times(run_dir: RunDir, plan: Plan, batch_size: int) -> Chain[TimesResult]:
    """Time base and experts once a run, on one worker while the others are idle."""
    item = WorkItem(
        key="times",
        function=measure_experts,
        job=TimesJob(run_dir, plan, batch_size),
        result_path=run_dir.times,
        cost=0.0,
        num_steps=len(plan.groups),
        result_type=TimesResult,
    )
    return (yield from result_of(item))


def measure_experts(job: TimesJob, report: Report) -> TimesResult:
    """Time the base and each expert alternately.

    A machine's speed drifts: each expert is compared with passes of the base between its own, and
    its time scaled to the median of all passes of the base.
    """
    device, size = worker_device(), job.batch_size
    base = load_network(job.run_dir.base_unet).to(device)
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

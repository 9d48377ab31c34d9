"""Measures what a step of training takes on the workers, before there is anything to train."""

import math
import time
from dataclasses import dataclass, replace
from itertools import takewhile

from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.batches import batches
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.loss import Teacher
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.train import start_state, train
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import (
    Report,
    Resources,
    WorkItem,
    actor_resources,
    base_resources,
)
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import build_network, family_of
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.timing import time_passes
from tdc_ray.pruning.space import fit_to_limit, space_of
from tdc_ray.runs.pretrained.importer import with_dropout
from tdc_ray.storage.files import remove
from tdc_ray.storage.run_dir import RunDir

MIN_STEPS, MAX_STEPS = 2, 100
"""Least and most steps that are timed, after one that is not."""

MAX_SECONDS, SHARE = 5.0, 0.01
"""Seconds of further steps, and most of the hours that they may take."""

MAX_SHARE = 0.05
"""Share of the hours after which no more steps are begun, and most of it that forward passes take:
on a busy machine even the fewest steps may last long."""

PASS_IMAGES = 64
"""Most images of a forward pass that is timed."""


@dataclass(frozen=True, slots=True)
class StepTimesJob:
    """Time a training step of the base, or of an expert, and a forward pass."""

    config: RunConfig
    network: NetworkConfig
    """The base's."""

    limit_share: float | None
    """Of an expert's macs in the base's; None means the base itself."""


@dataclass(frozen=True, slots=True)
class StepTimesResult:
    """What was measured on one worker while the others of its kind measured, too."""

    step_seconds: float
    """Of an optimizer step with this worker's share of the batch, its images loaded."""

    pass_seconds: float
    """Of a forward pass of the network for one image, at the batch size of the evaluation or
    ``PASS_IMAGES``."""

    seconds: float
    """Of the whole measurement."""


def step_times(
    run_dir: RunDir, config: RunConfig, network: NetworkConfig, limit_share: float, workers: int
) -> tuple[Chain[StepTimesResult], dict[str, Chain[StepTimesResult]]]:
    """Return chains that time the base, which is alone, and an expert, on all workers at once.

    Args:
        run_dir: The run.
        config: Its settings, without a precision that is auto.
        network: The base's config.
        limit_share: Of an expert's macs in the base's, on average.
        workers: How many train experts side by side.
    """
    expert = actor_resources(config.compute)
    alone = StepTimesJob(config, network, None)
    pruned = StepTimesJob(config, network, limit_share)
    remove(run_dir.step_times)  # of an earlier call, which may have had other settings
    base = _chain(run_dir, "base", alone, base_resources(config.compute))
    experts = {
        (name := f"expert-{index}"): _chain(run_dir, name, pruned, expert)
        for index in range(workers)
    }
    return base, experts


def _chain(
    run_dir: RunDir, name: str, job: StepTimesJob, resources: Resources
) -> Chain[StepTimesResult]:
    item = WorkItem(
        key=f"step-times/{name}",
        function=measure_steps,
        job=job,
        result_path=run_dir.step_times / f"{name}.json",
        cost=0.0,
        resources=resources,
        result_type=StepTimesResult,
    )
    return (yield from result_of(item))


def measure_steps(job: StepTimesJob, report: Report) -> StepTimesResult:
    """Train a network of random weights for some steps, then time its forward passes."""
    started, config, device = time.perf_counter(), job.config, worker_device()
    base = build_network(with_dropout(job.network, config.model.dropout)).to(device)
    network, settings, workers = base, config.base, config.compute.num_base_workers
    teacher = None
    if job.limit_share is not None:
        network = _pruned(base, job.network, job.limit_share).to(device)
        settings, workers = config.finetune, config.compute.workers_per_finetune
        if share := config.finetune.distillation_share:
            teacher = Teacher(base.eval(), share)
    seconds = _step_seconds(config, network, settings, workers, teacher)
    report({"milliseconds": 1e3 * seconds}, 1)
    # A step is about as long as three passes, of which there are as many: one is not timed.
    affordable = _affordable_seconds(config) / seconds * settings.batch_size / workers
    batch_size = max(1, math.floor(min(config.evaluate.batch_size, PASS_IMAGES, affordable)))
    (times,) = time_passes([network.eval()], batch_size, min_repeats=2, min_seconds=0.5)
    each = times.total / batch_size
    return StepTimesResult(seconds, each, time.perf_counter() - started)


def _pruned(base: Denoiser, config: NetworkConfig, share: float) -> Denoiser:
    """Cut a base to a share of its macs, or as far as it can be."""
    space = space_of(config)
    limit = max(math.floor(share * space.macs_base), space.macs(space.smallest))
    alike = {unit.name: [1.0] * unit.width for unit in space.units}
    widths = fit_to_limit(space, space.full, limit, alike)
    kept = {name: tuple(range(width)) for name, width in widths.items()}
    return family_of(base).cut(base, space.units, kept)


def _step_seconds(
    config: RunConfig,
    network: Denoiser,
    settings: TrainConfig,
    workers: int,
    teacher: Teacher | None,
) -> float:
    """Return the mean seconds of a training step, but for the first, which allocates memory.

    The first counts where there is time for no other, unless it compiles the network.
    """
    timed = replace(settings, num_steps=MAX_STEPS + 2, checkpoint_every=2 * MAX_STEPS, log_every=1)
    began, marks = 0.0, list[float]()
    counted = 0 if settings.compile == "none" else 1  # the first step that may count

    enough = min(MAX_SECONDS, SHARE * 3600 * (config.budget.hours or math.inf))
    most = _affordable_seconds(config)

    def go_on(_batch: object) -> bool:
        nonlocal began
        if len(marks) <= counted:  # the loader has started, and the network is compiled
            began = time.perf_counter()
            return True
        if marks[-1] - began > most:
            return False
        return len(marks) <= MIN_STEPS or marks[-1] - marks[0] < enough

    data = training_data(config.data, config.evaluate.cache_dir)
    images = batches(
        data.open(),
        batch_size=settings.batch_size,
        seed=config.seed,
        num_steps=MAX_STEPS + 1,
        world_size=workers,
        num_workers=config.data.num_workers,
    )
    state = start_state(network, timed)
    train(
        state,
        state.unet,
        takewhile(go_on, images),
        noise_schedule(config.diffusion).to(network.device),
        timed,
        config.data,
        timesteps=range(config.diffusion.num_timesteps),
        seed=config.seed,
        label_dropout=config.conditioning.label_dropout,
        caption_dropout=data.caption_dropout(config.conditioning.caption_dropout),
        teacher=teacher,
        report=lambda _metrics, _step: marks.append(time.perf_counter()),
        save=lambda _state: None,
    )
    if len(marks) == 1:
        return marks[0] - began
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def _affordable_seconds(config: RunConfig) -> float:
    """Return the seconds that steps, and that passes, may take."""
    return MAX_SHARE * 3600 * (config.budget.hours or math.inf)

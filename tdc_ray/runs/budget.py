"""How many steps a run takes by its budget: ``--hours``, ``--train-macs`` or ``--epochs``."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from tdc_ray.config.budget import LEAST_IMAGES
from tdc_ray.config.presets import preset
from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.batches import base_indices
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.plan import Plan
from tdc_ray.errors import ConfigError
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.structure import network_structure
from tdc_ray.runs.evaluation.evaluate import num_sampled
from tdc_ray.runs.evaluation.features import (
    CLASSIFIER_BATCH,
    CLASSIFIER_STEPS,
    FeatureSpec,
    classifier_macs,
)
from tdc_ray.runs.simulation import search_seconds
from tdc_ray.runs.stages.budgets import finetunes
from tdc_ray.runs.stages.finetune import macs_per_image
from tdc_ray.runs.stages.step_times import StepTimesResult
from tdc_ray.runs.stages.timing import MIN_REPEATS
from tdc_ray.storage.files import exists

logger = logging.getLogger(__name__)

Train = TypeVar("Train", bound=TrainConfig)

EMA_SPANS = 5
"""How many times 1 / (1 - decay) steps a moving average needs to forget where it started."""

WARMUP_SHARE = 0.1
"""Longest warm-up, as a share of the steps."""

NUM_CHECKPOINTS = 10
"""Checkpoints of a training that has fewer steps than the preset's."""

MARGIN = 0.15
"""Share of the hours that is left: machines are not always as fast as when they were timed."""

SEARCH_FACTOR = 2.0
"""Seconds of a search in those of its forward passes: there are refits and waiting, too."""

NUM_STARTS, STAGE_1_STARTS, MIN_START_SECONDS = 5, 3, 8.0
"""Starts of a worker after the measurement, those of stage 1, and how long one takes at least: Ray
Train's processes, one after another, take about three, those of stage 2 one, results and pictures
one."""

GRID_IMAGES = 16
"""Images that stage 1 samples at every checkpoint."""

CHECKPOINT_BYTES, BYTES_PER_SECOND = 16, 1e8
"""Of a parameter (itself, its average, two moments), and how fast a disk takes them at least."""

FEATURE_MACS = {"inception": 5.7e9, "clip": 8e10, "dinov2": 8e10}
"""Of the features of an image."""

LEAST_BASE_STEPS = 1000
"""Where the hours have room for fewer steps of the base, architecture auto takes a smaller one."""

IMAGES_SHARE = 0.5
"""Most of the time left that search and evaluation may take: of fewer images, if need be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds that the parts of a run take on its workers, at the steps of the settings."""

    base: float
    """Stage 1, with the pictures at its checkpoints."""

    finetunes: float
    comparison: float
    """Training the base on for ``--compare``."""

    search: float
    """In proportion to the images of pruning."""

    evaluation: float
    """Sampling and features, or losses, in proportion to the images of the evaluation."""

    reference: float
    """A classifier, or the features of the training images."""

    starts: float
    """Starts of workers."""

    other: float
    """Pictures, checkpoints, times of the experts."""

    @property
    def training(self) -> float:
        """All that is in proportion to the steps."""
        return self.base + self.finetunes + self.comparison

    @property
    def rest(self) -> float:
        """All that is not."""
        return self.search + self.evaluation + self.reference + self.starts + self.other

    @property
    def stage_1(self) -> float:
        """Stage 1, with the starts of its workers and what else comes with it."""
        return self.base + STAGE_1_STARTS / NUM_STARTS * self.starts + self.other

    def of_smaller(self, share: float) -> "Timing":
        """Return what the parts take of a network of so many times the macs."""
        times = {field.name: share * getattr(self, field.name) for field in fields(self)}
        return Timing(**times | {"reference": self.reference, "starts": self.starts})

    def split(self, elapsed: float) -> str:
        """Write in minutes what a run takes that got so far in so many seconds."""
        parts = {
            "until here": elapsed,
            "base": self.base,
            "search": self.search,
            "fine-tunes": self.finetunes,
            "comparison": self.comparison,
            "sampling and scores": self.evaluation,
            "their reference": self.reference,
            "starting workers and so on": self.starts + self.other,
        }
        return ", ".join(f"{name} {part / 60:.1f}" for name, part in parts.items() if part)


def trains_base(config: RunConfig) -> bool:
    """Whether the run trains a base."""
    return config.model.base is None


def steps_by_count(config: RunConfig, plan: Plan, macs_base: int) -> RunConfig:
    """Return settings with the steps that ``--train-macs`` or ``--epochs`` buys, if one is given.

    Args:
        config: The settings.
        plan: The groups and their limits.
        macs_base: Of a forward pass of the base.

    Raises:
        ConfigError: It buys not a single step, or there is no base to count epochs of.
    """
    budget, base = config.budget, config.base
    if budget.flag is not None and trains_base(config) and base.num_steps == 0:
        raise ConfigError(f"base.num_steps must be above 0 with {budget.flag}, got 0.")
    if budget.epochs is not None:
        if not trains_base(config):
            raise ConfigError(
                "--epochs counts those of the base, which --base brings: use --hours or "
                "--train-macs, or set --finetune.num-steps."
            )
        dataset = load_dataset(config.data)
        num_images = len(base_indices(dataset, config.prune, config.seed) or dataset)
        num_steps = math.ceil(budget.epochs * num_images / base.batch_size)
        logger.info("--epochs %g: %d images", budget.epochs, num_images)
        return with_scaled_steps(config, num_steps / base.num_steps)
    if budget.train_macs is None:
        return config
    macs = training_macs(config, plan, macs_base)
    if macs == 0:
        raise ConfigError("--train-macs must be left out where nothing is trained.")
    scale = budget.train_macs / macs
    if scale * _fewest_steps(config) < 1:
        least = macs / _fewest_steps(config)
        raise ConfigError(
            f"--train-macs must be at least {least:.2g} for one step of everything that is "
            f"trained, got {budget.train_macs:g}."
        )
    return with_scaled_steps(config, scale)


def training_macs(config: RunConfig, plan: Plan, macs_base: int) -> float:
    """Return the macs of base and fine-tunes; experts have what their limits allow."""
    base = config.base
    macs = 3.0 * macs_base * base.num_steps * base.batch_size if trains_base(config) else 0.0
    return macs + finetune_macs(config, plan, macs_base)


def finetune_macs(config: RunConfig, plan: Plan, macs_base: int) -> float:
    """Return the macs of the fine-tunes."""
    macs = 0.0
    for group, train in zip(plan.groups, finetunes(config.finetune, plan.groups), strict=True):
        share = 1.0 if config.prune.method == "none" else group.limit_share
        each = macs_per_image(train, share * macs_base, macs_base)
        macs += each * train.num_steps * train.batch_size
    return macs


def steps_by_time(config: RunConfig, timing: Timing, elapsed: float) -> tuple[RunConfig, Timing]:
    """Return settings with as many steps as the rest of ``--hours`` has room for; log the split.

    Where search and evaluation would take most of it, they get fewer images than the preset says.

    Args:
        config: The settings, and so the ratio of the steps.
        timing: What these take.
        elapsed: Seconds since the run started.

    Returns:
        The settings, and what they take.

    Raises:
        ConfigError: There is no room for a single step of each.
    """
    asked, hours = config, config.budget.hours
    assert hours is not None
    config, timing, room = _shared_out(config, timing, elapsed)
    for stage, names in LEAST_IMAGES.items():
        before, after = getattr(asked, stage), getattr(config, stage)
        if fewer := [name for name in names if getattr(before, name) != getattr(after, name)]:
            logger.info(
                "--hours %g: %s",
                hours,
                ", ".join(
                    f"{stage}.{name} {getattr(after, name)} in place of {getattr(before, name)}"
                    for name in fewer
                ),
            )
    if timing.training == 0 or room * _fewest_steps(config) < timing.training:
        fixed = elapsed + timing.rest
        least = fixed + timing.training / _fewest_steps(config)
        untrained = replace(timing, base=0.0, finetunes=0.0, comparison=0.0)
        raise ConfigError(
            f"--hours must be at least {least / 3600 / (1 - MARGIN):.2g} here, got {hours:g}: all "
            f"but training takes about {fixed / 60:.1f} minutes ({untrained.split(elapsed)}). "
            "Give more, or take fewer images of --evaluate.num-images "
            f"{config.evaluate.num_images}, fewer of --plan.num-groups {config.plan.num_groups}, "
            "or smaller ones by --data.image-size."
        )
    scale = room / timing.training
    timing = replace(
        timing,
        base=scale * timing.base,
        finetunes=scale * timing.finetunes,
        comparison=scale * timing.comparison,
    )
    logger.info(
        "--hours %g is %.1f minutes: %s, in reserve %.1f",
        hours,
        60 * hours,
        timing.split(elapsed),
        60 * hours * MARGIN,
    )
    config = with_scaled_steps(config, scale)
    if trains_base(config) and config.base.num_steps < _enough_base_steps(asked):
        logger.warning(
            "--hours %g has room for %d steps of the base, which will hardly draw images yet: "
            "give more, or smaller images by --data.image-size",
            hours,
            config.base.num_steps,
        )
    return config, timing


def has_room(config: RunConfig, timing: Timing, elapsed: float, share: float) -> bool:
    """Whether ``--hours`` has room to train a base of so many times the macs.

    That is, for ``LEAST_BASE_STEPS`` steps, or the preset's, if these are fewer.

    Args:
        config: The settings of a run that trains its base.
        timing: What the parts of the run take with its own network.
        elapsed: Seconds since the run started.
        share: The other network's macs, by those of its own.
    """
    _, left, room = _shared_out(config, timing.of_smaller(share), elapsed)
    return room * config.base.num_steps >= _enough_base_steps(config) * left.training


def _enough_base_steps(config: RunConfig) -> int:
    return min(LEAST_BASE_STEPS, config.base.num_steps)


def _shared_out(
    config: RunConfig, timing: Timing, elapsed: float
) -> tuple[RunConfig, Timing, float]:
    """Lower the images of search and evaluation, if need be, to their share of the time left.

    Returns:
        The settings, what they take, and the seconds that are left for training.
    """
    hours = config.budget.hours
    assert hours is not None
    room = (1 - MARGIN) * 3600 * hours - elapsed
    for_images = room - timing.reference - timing.starts - timing.other
    config, timing = _with_fewer_images(config, timing, for_images)
    return config, timing, room - timing.rest


def with_time_left(
    config: RunConfig, timing: Timing, stage_1_seconds: float, elapsed: float
) -> RunConfig:
    """Return settings with fewer steps of the fine-tunes where stage 1 took longer than planned.

    What is left is then taken to be as much slower.

    Args:
        config: The settings that :func:`steps_by_time` returned.
        timing: What they were to take.
        stage_1_seconds: What stage 1 took.
        elapsed: Seconds since the run started.
    """
    assert config.budget.hours is not None
    slower = stage_1_seconds / timing.stage_1
    starts = (1 - STAGE_1_STARTS / NUM_STARTS) * timing.starts
    after = timing.search + timing.evaluation + timing.reference + starts
    training = timing.finetunes + timing.comparison
    if slower <= 1 or config.finetune.num_steps == 0:
        return config
    room = (1 - MARGIN) * 3600 * config.budget.hours - elapsed
    scale = (room / slower - after) / training
    if scale >= 1:
        return config
    finetune = _scaled(config.finetune, max(0.0, scale))
    logger.warning(
        "stage 1 took %.1f times as long as planned: finetune.num_steps %d in place of %d",
        slower,
        finetune.num_steps,
        config.finetune.num_steps,
    )
    return replace(config, finetune=finetune)


def _with_fewer_images(config: RunConfig, timing: Timing, room: float) -> tuple[RunConfig, Timing]:
    """Lower the images of search and evaluation, if need be, to their share of the seconds left.

    Returns:
        The settings, and what they take.
    """
    share = IMAGES_SHARE * max(0.0, room) / max(timing.search + timing.evaluation, 1e-9)
    usual, ratios = preset(config.preset), {}
    for stage, least in LEAST_IMAGES.items():
        asked = getattr(config, stage)
        fewer = {
            name: max(lowest, math.floor(share * number))
            for name, lowest in least.items()
            if (number := getattr(asked, name)) == getattr(getattr(usual, stage), name)
            and number > lowest
        }
        ratios[stage] = 1.0
        if share >= 1 or not fewer:
            continue
        ratios[stage] = max(number / getattr(asked, name) for name, number in fewer.items())
        config = replace(config, **{stage: replace(asked, **fewer)})
    search, evaluation = ratios["prune"] * timing.search, ratios["evaluate"] * timing.evaluation
    return config, replace(timing, search=search, evaluation=evaluation)


def timing_of(
    config: RunConfig,
    network: NetworkConfig,
    plan: Plan,
    spec: FeatureSpec | None,
    base: StepTimesResult,
    experts: Sequence[StepTimesResult],
    macs_base: int,
    start_seconds: float,
) -> Timing:
    """Estimate what a run takes from what was measured.

    Args:
        config: The settings.
        network: The base's config.
        plan: The groups and their limits.
        spec: The features that images are scored by. None means that none is scored.
        base: The times of the base, alone.
        experts: The times of an expert of the mean limit, on all workers at once.
        macs_base: Of a forward pass of the base.
        start_seconds: Of the start of a worker.
    """
    workers, finetune, groups = len(experts), config.finetune, plan.groups
    mean_share = mean_limit(config, plan)
    step = max(one.step_seconds for one in experts)
    expert_pass = max(one.pass_seconds for one in experts)
    base_pass = max(base.pass_seconds, expert_pass)
    macs_per_second = min(macs_base / base_pass, mean_share * macs_base / expert_pass)
    passes = len(plan.sampling_timesteps) * (1 if config.sampler.guidance_scale == 1 else 2)
    stage_1 = grids = 0.0
    if trains_base(config):
        grid = GRID_IMAGES * passes * base_pass
        stage_1 = config.base.num_steps * (base.step_seconds + grid / config.base.checkpoint_every)
        grids = NUM_CHECKPOINTS * grid  # however few steps there will be
    seconds = [
        train.num_steps * step * (1.0 if mean_share == 1 else group.limit_share / mean_share)
        for group, train in zip(groups, finetunes(finetune, groups), strict=True)
    ]
    tuning = makespan(seconds, max(1, workers // config.compute.workers_per_finetune))
    search = SEARCH_FACTOR * search_seconds(config, network, workers, macs_per_second)
    images, num_passes = config.evaluate.num_images, base_pass + expert_pass
    comparison = compared = 0.0
    if config.compare.kind != "none":  # the base trained on costs as much as the fine-tunes
        rate = base.step_seconds / (3.0 * macs_base * config.base.batch_size)
        comparison = rate * finetune_macs(config, plan, macs_base)
        losses = len(groups) * config.compare.num_images * num_passes / workers
        compared = losses + workers * search  # it trains by as many macs, on one worker
        num_passes += base_pass * (1 + len(groups) * config.compare.swaps)
    reference = 0.0
    if spec is None:  # losses of one base or both beside TDC's, and samples to be seen
        pairs = len(groups) * (1 if config.compare.kind == "none" else 2)
        of_image = pairs * (base_pass + expert_pass)
        grids += num_sampled(config.evaluate, spec) * passes * num_passes / workers
    else:
        features = 0.0
        if spec.kind != "classifier":
            features = FEATURE_MACS[spec.kind] / macs_per_second
        elif not exists(spec.path):
            seen = 3 * CLASSIFIER_STEPS * CLASSIFIER_BATCH
            reference = seen * classifier_macs(config.data.shape) / macs_per_second
        if config.evaluate.reference is None and not exists(spec.moments_path):
            reference += len(load_dataset(config.data)) * features / workers
        of_image = passes * num_passes + 2 * features
    saves = NUM_CHECKPOINTS * (trains_base(config) + -(-len(groups) // workers))
    saved = saves * CHECKPOINT_BYTES * network_structure(network).num_params / BYTES_PER_SECOND
    timed = config.prune.latency_batch_size * (base_pass + expert_pass)
    return Timing(
        base=stage_1,
        finetunes=tuning,
        comparison=comparison,
        search=search,
        evaluation=images * of_image / workers,
        reference=reference,
        starts=NUM_STARTS * max(MIN_START_SECONDS, start_seconds),
        other=grids + compared + saved + len(groups) * MIN_REPEATS * timed,
    )


def mean_limit(config: RunConfig, plan: Plan) -> float:
    """Return the mean over the groups of an expert's limit, as a share of the base."""
    if config.prune.method == "none":
        return 1.0
    return math.fsum(group.limit_share for group in plan.groups) / len(plan.groups)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Return how long pieces of work take, the longest first, each on the worker free first."""
    loads = [0.0] * workers
    for each in sorted(seconds, reverse=True):
        loads[loads.index(min(loads))] += each
    return max(loads)


def with_scaled_steps(config: RunConfig, scale: float) -> RunConfig:
    """Return settings whose base and fine-tunes have so many times as many steps; log them."""
    config = replace(config, finetune=_scaled(config.finetune, scale))
    base = ""
    if trains_base(config):
        config = replace(config, base=_scaled(config.base, scale))
        base = f"base.num_steps {config.base.num_steps}, "
    logger.info("%s: %sfinetune.num_steps %d", config.budget.flag, base, config.finetune.num_steps)
    return config


def _scaled(train: Train, scale: float) -> Train:
    """Scale the steps; shorten warm-up, moving average and checkpoints too long for fewer."""
    if train.num_steps == 0:
        return train
    num_steps = max(1, round(scale * train.num_steps))
    if num_steps >= train.num_steps:
        return replace(train, num_steps=num_steps)
    return replace(
        train,
        num_steps=num_steps,
        num_warmup_steps=min(train.num_warmup_steps, math.ceil(WARMUP_SHARE * num_steps)),
        ema_warmup=train.ema_warmup or num_steps * (1 - train.ema_decay) < EMA_SPANS,
        checkpoint_every=min(train.checkpoint_every, max(1, num_steps // NUM_CHECKPOINTS)),
    )


def _fewest_steps(config: RunConfig) -> int:
    """Return the steps of what trains for the fewest, of base and fine-tunes that train at all."""
    steps = [config.finetune.num_steps]
    if trains_base(config):
        steps.append(config.base.num_steps)
    return min(filter(None, steps), default=1)

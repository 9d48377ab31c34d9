"""What workers are asked on a group's timesteps: jobs, and what their results follow from."""

from dataclasses import dataclass

from tdc_ray.config.prune import ScoreMethod
from tdc_ray.config.run import RunConfig
from tdc_ray.data.fingerprint import data_key
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.item import Inputs
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.units import KeptIndices
from tdc_ray.pruning.criteria.registry import CRITERIA
from tdc_ray.pruning.criteria.scores import Scores
from tdc_ray.pruning.fingerprint import measuring_key, timesteps_key
from tdc_ray.storage.run_dir import RunDir

VERSION = 3
"""Changes whenever scores, sensitivities or losses do, so that stored ones are made again."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Score the base's units on a group's timesteps."""

    run_dir: RunDir
    config: RunConfig
    group: TimestepGroup
    method: ScoreMethod


@dataclass(frozen=True, slots=True)
class SensitivityJob:
    """Measure how the loss of the base, or of a cut of it, grows when one unit is cut further."""

    run_dir: RunDir
    config: RunConfig
    group: TimestepGroup
    units: tuple[str, ...]
    """Inner units."""

    kept: KeptIndices
    """What the model that is measured keeps of the base: the best by score."""

    scores: Scores
    """Of the base's units; those that have none are ranked by reconstruction, on this model."""


@dataclass(frozen=True, slots=True)
class StreamJob:
    """The same for one unit of the stream, whose every width is a candidate of its own."""

    run_dir: RunDir
    config: RunConfig
    group: TimestepGroup
    unit: str
    kept: KeptIndices
    scores: Scores
    loss: float
    """Of the model that is measured, on the group's held-out images."""


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """Cut the base, refit what is left, and measure the loss on a group's timesteps."""

    run_dir: RunDir
    config: RunConfig
    group: TimestepGroup
    kept: KeptIndices
    number: int
    """Place in the group's search, from 0: the base; the step of its metrics."""

    leaves_weights: bool = False
    """Leave how much every image counts in the refits of the group, which the base alone tells."""


def score_inputs(job: ScoreJob) -> Inputs:
    """Give what :func:`score_units` follows from."""
    place = {"group": job.group.index} if CRITERIA[job.method].is_seeded else {}
    return {"stage": "scores", "method": job.method, **place, **_inputs(job)}


def sensitivity_inputs(job: SensitivityJob) -> Inputs:
    """Give what :func:`measure_sensitivities` follows from."""
    levels = job.config.prune.num_levels, job.config.prune.channel_multiple
    what = {"units": job.units, "levels": levels, "kept": job.kept, "scores": job.scores}
    return {"stage": "sensitivities", **what, **_inputs(job)}


def stream_inputs(job: StreamJob) -> Inputs:
    """Give what :func:`measure_stream` follows from."""
    levels = job.config.prune.num_levels, job.config.prune.channel_multiple
    what = {"unit": job.unit, "levels": levels, "kept": job.kept, "scores": job.scores}
    return {"stage": "stream", "loss": job.loss, **what, **_inputs(job)}


def measure_inputs(job: MeasureJob) -> Inputs:
    """Give what :func:`measure_candidate` follows from."""
    what = {"kept": job.kept, "weights": job.leaves_weights}
    return {"stage": "measure", **what, **_inputs(job)}


def _inputs(job: ScoreJob | SensitivityJob | StreamJob | MeasureJob) -> Inputs:
    return {
        "version": VERSION,
        "base": weights_digest(job.run_dir.base_unet),
        **data_key(
            training_data(job.config.data, job.config.evaluate.cache_dir),
            seed=job.config.seed,
            diffusion=job.config.diffusion,
            conditioning=job.config.conditioning,
            tf32=job.config.compute.tf32,
        ),
        **timesteps_key(job.group),
        **measuring_key(job.config.prune),
    }

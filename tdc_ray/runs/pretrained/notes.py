"""Says what a base's own pipeline does otherwise than a run: how images are drawn, above all."""

import inspect
from typing import Any

import diffusers

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.runs.pretrained.sources import PretrainedBase

_NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
)
"""Settings of a scheduler that come along with the base, or are refused."""

_OF_THRESHOLDING = ("dynamic_thresholding_ratio", "sample_max_value")
_OF_SPACING = ("timestep_spacing", "steps_offset")


def base_notes(
    base: PretrainedBase, diffusion: DiffusionConfig, sampler: SamplerConfig
) -> list[str]:
    """Return a line for each thing that a base does not say, or that its pipeline does otherwise.

    Args:
        base: The base.
        diffusion: The run's noise process.
        sampler: How the run draws images.
    """
    notes = []
    if base.folder is None:
        notes.append(
            f"{base.source} does not say what it predicts ({diffusion.prediction_type} is taken, "
            "unless --diffusion.prediction-type is given), how many heads its attentions have on "
            "the way up (as many as elsewhere, unless --model.num-heads-upsample is given), nor "
            "the order of their q, k and v (heads come first, unless "
            "--model.use-new-attention-order is given)"
        )
    elif base.settings.diffusion.prediction_type is None:
        notes.append(
            f"{base.source} does not say what it predicts: {diffusion.prediction_type} is taken"
        )
    if base.scheduler is not None and (other := _other_sampling(base, diffusion, sampler)):
        notes.append(other)
    return notes


def _other_sampling(
    base: PretrainedBase, diffusion: DiffusionConfig, sampler: SamplerConfig
) -> str | None:
    """Compare the scheduler of a base's pipeline with the run's; None means they are the same."""
    theirs = dict(base.scheduler or {})
    name = str(theirs.pop("_class_name"))
    scheduler = make_scheduler(diffusion, sampler)
    ours = dict(scheduler.config)
    is_same = name == type(scheduler).__name__
    kind: Any = getattr(diffusers, name, None)
    defaults = {} if kind is None else inspect.signature(kind).parameters
    skipped = [*_NOISE, *_OF_THRESHOLDING]
    if theirs.get("use_karras_sigmas") and ours.get("use_karras_sigmas"):
        skipped += _OF_SPACING
    if not theirs.get("clip_sample"):
        skipped.append("clip_sample_range")
    other = {}
    for setting, value in theirs.items():
        if setting not in defaults or setting in skipped:
            continue
        is_usual = value == defaults[setting].default
        if setting in ours and (is_same or setting in _OF_SPACING):
            is_usual = False
        if not is_usual and value != ours.get(setting, ...):
            other[setting] = value
    # Other samplers have no such step of their own.
    clips = is_same and name == "DDIMScheduler" and ours["clip_sample"] and sampler.clips_epsilon
    if is_same and not other and not clips:
        return None
    here = {setting: ours[setting] for setting in other if setting in ours}
    if clips:  # which diffusers' pipelines are asked for at each call
        here["use_clipped_model_output"] = True
    if ours.get("use_karras_sigmas"):  # which space the timesteps
        here = {"use_karras_sigmas": True} | here
        here.pop("timestep_spacing", None)
    if ours.get("clip_sample") and "clip_sample" not in theirs:
        here["clip_sample"] = True
    return (
        f"the pipeline of {base.source} samples by {name}{_listed(other)}, a run by "
        f"{sampler.name}{_listed(here)}: its scores are not the released pipeline's "
        "(--sampler.scheduler base samples as it does)"
    )


def _listed(settings: dict[str, Any]) -> str:
    text = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f" ({text})" if text else ""

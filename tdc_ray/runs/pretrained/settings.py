"""The settings that a pretrained base was trained with, and how a run's settings follow them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tdc_ray.config.budget import BudgetConfig
from tdc_ray.config.diffusion import BetaSchedule, PredictionType
from tdc_ray.config.image_size import ImageSize
from tdc_ray.config.model import ATTENTIONS, ModelConfig
from tdc_ray.config.run import RunConfig, from_json, to_json
from tdc_ray.config.validation import config_error
from tdc_ray.errors import ConfigError

NOISE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_timesteps")
"""Fields of ``DiffusionConfig`` without which a network cannot be used, beside what it
predicts."""


class _Some(BaseModel):
    """Settings of which a base has some; pydantic knows which fields were never set."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Diffusion(_Some):
    num_train_timesteps: int | None = None
    beta_schedule: BetaSchedule | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    rescale_timesteps: bool | None = None
    rescale_betas_zero_snr: bool | None = None
    prediction_type: PredictionType | None = None
    sigma_data: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    learned_sigma: bool | None = None
    vlb_weight: float | None = None


class _Sampler(_Some):
    scheduler: str | None = None
    steps_offset: int | None = None
    clip_sample: bool | None = None
    set_alpha_to_one: bool | None = None
    of_base: dict[str, Any] | None = None
    guidance_scale: float | None = None


class _Conditioning(_Some):
    num_classes: int | None = None


class _Data(_Some):
    num_channels: int | None = None
    image_size: ImageSize | None = None
    text_encoder: str | None = None
    first_stage: str | None = None


SAMPLER = ("steps_offset", "clip_sample", "set_alpha_to_one")
"""Fields of ``SamplerConfig`` that belong to a network, whatever its pipeline's scheduler."""


class PretrainedSettings(_Some):
    """Settings that a base was trained with, grouped as in ``RunConfig``."""

    diffusion: _Diffusion = _Diffusion()
    sampler: _Sampler = _Sampler()
    conditioning: _Conditioning = _Conditioning()
    data: _Data = _Data()

    def by_name(self) -> dict[str, Any]:
        """Return the known settings by dotted names, such as ``diffusion.num_train_timesteps``."""
        return {
            f"{stage}.{name}": value
            for stage, values in self.model_dump(exclude_unset=True).items()
            for name, value in values.items()
        }


def read_settings(source: str, document: Mapping[str, Mapping[str, Any]]) -> PretrainedSettings:
    """Check a base's settings; groups and names are those of ``PretrainedSettings``.

    Raises:
        ConfigError: A value has another type.
    """
    try:
        return PretrainedSettings.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source} cannot be used: {config_error(error)}") from error


def apply_settings(
    settings: PretrainedSettings, config: RunConfig, *, with_data: bool
) -> RunConfig:
    """Return a run's settings, replaced by a base's where it has them.

    Args:
        settings: The base's settings.
        config: The run's settings.
        with_data: Whether resolution and channels of the images are replaced, too.

    Raises:
        ConfigError: A value of the base is out of its range.
    """
    document = to_json(config)
    for name, value in settings.by_name().items():
        if with_data or name not in ("data.image_size", "data.num_channels"):
            stage, _, setting = name.partition(".")
            document[stage][setting] = value
    timesteps = document["diffusion"]["num_train_timesteps"]
    for stage, setting in (("sampler", "num_inference_steps"), ("plan", "num_groups")):
        document[stage][setting] = min(document[stage][setting], timesteps)
    return from_json(document)


def with_base(config: RunConfig, source: str, *, is_file: bool = False) -> RunConfig:
    """Return a run's settings for a base that is given.

    What trained a base of its own is left out: its network, its budget, its optimizer's state and
    what was held out of it.

    Args:
        config: The settings, such as those of the run that trained the base.
        source: The base.
        is_file: Whether it is a checkpoint file, which does not say its attentions.
    """
    default = ModelConfig()
    model = replace(
        config.model,
        base=source,
        width=default.width,
        depth=default.depth,
        config=default.config,
        network=default.network,
        **({} if is_file else {name: getattr(default, name) for name in ATTENTIONS}),
    )
    prune = replace(config.prune, held_out_of_base=False)
    finetune = replace(config.finetune, optimizer_state="new")
    return replace(config, model=model, prune=prune, finetune=finetune, budget=BudgetConfig())


def missing_settings(settings: PretrainedSettings) -> list[str]:
    """Return the names of the settings of the noise process that a base does not have."""
    diffusion = settings.diffusion
    unused: tuple[str, ...] = ()
    if diffusion.prediction_type == "flow_prediction" or diffusion.sigma_data is not None:
        unused = ("beta_schedule", "beta_start", "beta_end")
    elif diffusion.beta_schedule == "squaredcos_cap_v2":
        unused = ("beta_start", "beta_end")
    needed = [name for name in NOISE if name not in unused]
    known = settings.diffusion.model_fields_set
    return [f"diffusion.{name}" for name in needed if name not in known]

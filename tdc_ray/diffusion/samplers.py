"""The samplers: any scheduler of diffusers, and a row for each of the short names.

A plan reads the timesteps. Those of the short names are computed here, so that such a plan needs
no framework; all others are asked of the scheduler, and diffusers is imported where one is made.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from tdc_ray.config.diffusion import EDM_FIELDS, DiffusionConfig, PredictionType
from tdc_ray.config.sampler import BASE, Sampler, SamplerConfig
from tdc_ray.config.validation import require
from tdc_ray.diffusion.schedule import KARRAS_RHO, NoiseProcess, betas_of, nearest_timestep
from tdc_ray.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


QUADRATIC_SHARE = 0.8
"""Share of the timesteps that DDIM's code spaces quadratically (ermongroup/ddim)."""

SETTING_OF = {
    "num_train_timesteps": "--diffusion.num-train-timesteps",
    "beta_start": "--diffusion.beta-start",
    "beta_end": "--diffusion.beta-end",
    "beta_schedule": "--diffusion.beta-schedule",
    "trained_betas": "--diffusion.beta-schedule",
    "rescale_betas_zero_snr": "--diffusion.rescale-betas-zero-snr",
    "use_flow_sigmas": "--diffusion.prediction-type flow_prediction",
    "prediction_type": "--diffusion.prediction-type",
    "timestep_spacing": "--sampler.spacing",
    "steps_offset": "--sampler.steps-offset",
    "clip_sample": "--sampler.clip-sample",
    "set_alpha_to_one": "--sampler.set-alpha-to-one",
}
"""Flags of what schedulers have as settings, too."""

EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""Classes of diffusers for networks with EDM's preconditioning; their timesteps are c_noise."""

OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings of a diffusers scheduler that space its sigmas otherwise than by timesteps."""

NEEDED = {
    "timestep_type": "discrete",
}
"""Settings of a diffusers scheduler that decide the noise process, or what the network takes, and
have one supported value."""

_LITERALS = {"True": True, "False": False, "None": None}
"""Python's words for what JSON writes otherwise."""


def _leading(process: NoiseProcess, sampler: SamplerConfig) -> list[int]:
    """Space the timesteps as diffusers' ``leading``: evenly, the last at the offset."""
    stride = len(process.snr) // sampler.num_inference_steps
    steps = reversed(range(sampler.num_inference_steps))
    return [step * stride + sampler.steps_offset for step in steps]


def quadratic(num_train_timesteps: int, num_steps: int, offset: int = 0) -> list[int]:
    """Space the timesteps as DDIM's code does: squares of evenly spaced numbers, noisiest first.

    From 0.8 T down (arXiv:2010.02502, appendix D.2). Those that come twice, where steps are less
    than one timestep apart, are there once: DDIM's second step there changes nothing.
    """
    roots = np.linspace(0, np.sqrt(num_train_timesteps * QUADRATIC_SHARE), num_steps)
    timesteps: list[int] = (np.unique((roots**2).astype(int)) + offset).tolist()
    return timesteps[::-1]


def begins_near_the_end(num_train_timesteps: int, num_steps: int, first: float) -> bool:
    """Whether steps begin within one stride of the last timestep, as those do that divide T."""
    return num_train_timesteps - 1 - first <= num_train_timesteps / num_steps


def nearest_steps(num_train_timesteps: int, num_steps: int) -> str:
    """Return the nearest numbers of steps, in words, that divide the timesteps."""
    below, above = range(num_steps, 0, -1), range(num_steps, num_train_timesteps + 1)
    nearest = [next(n for n in side if num_train_timesteps % n == 0) for side in (below, above)]
    return " or ".join(map(str, nearest))


def _second_twice(process: NoiseProcess, sampler: SamplerConfig) -> list[int]:
    """Visit the second timestep twice: PNDM makes its first step again by what it learns there."""
    steps = _leading(process, sampler)
    return steps[:2] + steps[1:]


def _karras(process: NoiseProcess, sampler: SamplerConfig) -> list[int]:
    """Space the timesteps evenly in sigma^(1/7), from the last to 0.

    EDM, arXiv:2206.00364, equation 5. In float32, as in diffusers: timesteps are rounded.

    Raises:
        ConfigError: The first two are the same, where diffusers would leave out the first, or the
            first sigma is infinite.
    """
    if process.betas is None or not process.has_signal:
        raise ConfigError(
            f"sampler.spacing must be trailing for {sampler.sampler} with "
            "diffusion.rescale_betas_zero_snr, whose first sigma is infinite, got None."
        )
    alphas_cumprod = np.cumprod(1 - process.betas.astype(np.float32), dtype=np.float32)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    low, high = (float(sigma) ** (1 / KARRAS_RHO) for sigma in (sigmas[0], sigmas[-1]))
    visited = np.linspace(high, low, sampler.num_inference_steps) ** KARRAS_RHO
    steps = np.interp(np.log(visited), np.log(sigmas), np.arange(len(sigmas))).round()
    timesteps = [int(step) for step in steps]
    if len(timesteps) > 1 and timesteps[0] == timesteps[1]:
        raise ConfigError(
            f"sampler.num_inference_steps must be less for {sampler.sampler} with these betas, "
            f"got {sampler.num_inference_steps}: it would begin with timestep {timesteps[0]} "
            "twice. Use ddim."
        )
    return timesteps


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """One sampler."""

    scheduler: str
    """Name of its class in diffusers."""

    arguments: Callable[[DiffusionConfig, SamplerConfig], dict[str, Any]]
    """Arguments of this class beside those of all samplers' classes."""

    timesteps: Callable[[NoiseProcess, SamplerConfig], list[int]] = _leading
    """Where the network is evaluated, noisiest first."""


SAMPLERS: Mapping[Sampler, SamplerRow] = {
    "ddim": SamplerRow(
        "DDIMScheduler",
        lambda _, sampler: {
            "clip_sample": sampler.clip_sample,
            "set_alpha_to_one": sampler.set_alpha_to_one,
        },
    ),
    "ddpm": SamplerRow(
        "DDPMScheduler",
        lambda diffusion, sampler: {
            "clip_sample": sampler.clip_sample,
            "variance_type": "learned_range" if diffusion.learned_sigma else "fixed_small",
        },
    ),
    "pndm": SamplerRow(
        "PNDMScheduler",
        lambda _, sampler: {"skip_prk_steps": True, "set_alpha_to_one": sampler.set_alpha_to_one},
        _second_twice,
    ),
    "dpmsolver++": SamplerRow(
        "DPMSolverMultistepScheduler",
        lambda _, sampler: {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "use_karras_sigmas": sampler.spacing is None,  # another spacing is in place of it
        },
        _karras,
    ),
}


def sampling_timesteps(diffusion: DiffusionConfig, sampler: SamplerConfig) -> tuple[float, ...]:
    """Return the timesteps at which a sampler evaluates the network, noisiest first.

    Whole numbers are ints; schedulers that space by sigmas visit others, too.

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: The sampler cannot take so many steps, or there is none with these settings.
    """
    if _is_short(sampler) and not diffusion.is_flow and not diffusion.is_edm:
        row = SAMPLERS[sampler.sampler]
        return tuple(row.timesteps(NoiseProcess.of(diffusion), sampler))
    scheduler = make_scheduler(diffusion, sampler)
    set_timesteps(scheduler, sampler.num_inference_steps)
    return timesteps_of(scheduler)


def checked_timesteps(diffusion: DiffusionConfig, sampler: SamplerConfig) -> tuple[float, ...]:
    """Return the timesteps of a sampler by which images are drawn, noisiest first.

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: The sampler cannot take so many steps, begins past the last timestep, or far
            below it, though it begins with noise, or ends below timestep 0.
    """
    total, steps = diffusion.num_timesteps, sampler.num_inference_steps
    rule = f"at most diffusion.num_train_timesteps = {diffusion.num_train_timesteps}"
    fits = steps <= diffusion.num_train_timesteps
    require("sampler", sampler, "num_inference_steps", rule, ok=fits)
    timesteps = sampling_timesteps(diffusion, sampler)
    first = timesteps[0]
    if first >= total:
        raise ConfigError(
            f"sampler.steps_offset {sampler.steps_offset} moves the first sampling step to "
            f"{first}, past the last timestep {total - 1}. Use 0, or fewer steps."
        )
    if timesteps[-1] < 0:  # trailing, of 61 steps for example
        raise ConfigError(
            f"sampler.num_inference_steps must be another number for {sampler.name}, got {steps}: "
            f"by a rounding of diffusers it would end at timestep {timesteps[-1]:g}."
        )
    if diffusion.rescale_betas_zero_snr and nearest_timestep(first) != total - 1:
        raise ConfigError(
            f"sampler.spacing must be trailing for {sampler.name} with "
            f"diffusion.rescale_betas_zero_snr, got steps that begin at {first:g}: images begin "
            f"with pure noise, which is what networks saw at timestep {total - 1} alone."
        )
    if sampler.spacing != "quadratic" and not begins_near_the_end(total, steps, first):
        begins = f"of {total} timesteps it would begin at {first:g}, with pure noise."
        if total % steps == 0:
            raise ConfigError(
                f"sampler.options must let {sampler.name} begin near timestep {total - 1}: "
                f"{begins} Leave out those that bound its noise."
            )
        raise ConfigError(
            f"sampler.num_inference_steps must be {nearest_steps(total, steps)} for "
            f"{sampler.name}, got {steps}: {begins} Or space them by --sampler.spacing trailing."
        )
    return timesteps


def timesteps_of(scheduler: "SchedulerMixin") -> tuple[float, ...]:
    """Return the timesteps that a scheduler is set to, as it visits them; whole ones are ints.

    Of EDM's, which visit c_noise, they are the nearest of training.

    Raises:
        ConfigError: They are no way from noise to an image, or the first comes twice, which
            schedulers that look their step up by the timestep would begin with the second of.
    """
    timesteps, name = scheduler.timesteps.tolist(), type(scheduler).__name__
    if not all(map(math.isfinite, timesteps)) or timesteps[-1] > timesteps[0]:
        raise ConfigError(
            f"the scheduler must go from noise to an image, got a {name} that goes from timestep "
            f"{timesteps[0]} to {timesteps[-1]}. Use DDIMScheduler, for example."
        )
    if len(timesteps) > 1 and timesteps[0] == timesteps[1] and hasattr(scheduler, "step_index"):
        raise ConfigError(
            f"sampler.num_inference_steps must be less for {name} with these betas, got "
            f"{len(timesteps)}: it would begin with timestep {timesteps[0]:g} twice. Use another "
            "spacing, or DDIMScheduler."
        )
    if name in EDM_SCHEDULERS:
        seen = edm_process(scheduler).conditioning
        assert seen is not None
        return tuple(int(np.abs(seen - step).argmin()) for step in timesteps)
    return tuple(int(step) if step == int(step) else step for step in timesteps)


def edm_process(scheduler: "SchedulerMixin") -> NoiseProcess:
    """Return the noise process of one of diffusers' EDM schedulers."""
    names = ("num_train_timesteps", *EDM_FIELDS)
    return NoiseProcess.edm(**{name: scheduler.config[name] for name in names})


def set_timesteps(scheduler: "SchedulerMixin", num_steps: int) -> None:
    """Set a scheduler to a number of steps, spaced quadratically if its settings say so.

    Raises:
        ConfigError: It cannot take so many.
    """
    name, config = type(scheduler).__name__, scheduler.config
    with _refused_by(f"{name} cannot take {num_steps} steps"):
        if config.get("timestep_spacing") != "quadratic":
            scheduler.set_timesteps(num_steps)
            return
        offset = config.get("steps_offset", 0)
        scheduler.set_timesteps(
            timesteps=quadratic(config["num_train_timesteps"], num_steps, offset)
        )


def make_scheduler(diffusion: DiffusionConfig, sampler: SamplerConfig) -> "SchedulerMixin":
    """Build the diffusers scheduler of the settings.

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: There is no such scheduler, it is for networks of another kind, or lacks a
            setting that is asked for.
    """
    import diffusers

    if diffusion.is_flow:
        return _flow_scheduler(diffusion, sampler)
    if diffusion.is_edm:
        return _edm_scheduler(diffusion, sampler)
    process, row = NoiseProcess.of(diffusion), SAMPLERS[sampler.sampler]
    arguments: dict[str, Any] = {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "trained_betas": betas_of(diffusion).tolist(),  # diffusers' own are float32
        "prediction_type": diffusion.prediction_type,
        "steps_offset": sampler.steps_offset,
    }
    if diffusion.rescale_betas_zero_snr:
        arguments["rescale_betas_zero_snr"] = True
    if sampler.scheduler is None:
        arguments |= {"timestep_spacing": "leading", **row.arguments(diffusion, sampler)}
        kind = getattr(diffusers, row.scheduler)
    else:
        kind = _class_of(sampler)
        _check_betas(kind)
        taken = inspect.signature(kind).parameters
        ours = arguments | {
            "clip_sample": sampler.clip_sample,
            "set_alpha_to_one": sampler.set_alpha_to_one,
        }
        learns = diffusion.learned_sigma and reads_variance(kind)
        variance = {"variance_type": "learned_range"} if learns else {}
        started = variance | (sampler.of_base or {}) | ours
        arguments = {name: value for name, value in started.items() if name in taken}
        if not reads_variance(kind):
            arguments.pop("variance_type", None)
    if diffusion.rescale_betas_zero_snr and (
        "rescale_betas_zero_snr" not in inspect.signature(kind).parameters
    ):
        raise ConfigError(
            f"sampler.scheduler {kind.__name__} has no rescale_betas_zero_snr: it cannot begin "
            "without signal. Use DDIMScheduler, for example."
        )
    if _is_short(sampler):
        return kind(**arguments)
    arguments |= _asked(kind, sampler)
    with _refused_by(f"sampler.scheduler {kind.__name__} cannot have these settings"):
        scheduler = kind(**arguments)
        trial = kind(**arguments)
    _check_prediction(trial, diffusion.prediction_type, sampler.num_inference_steps)
    _check_steps(scheduler, diffusion, sampler)
    _check_noise(scheduler, process)
    return scheduler


def _flow_scheduler(diffusion: DiffusionConfig, sampler: SamplerConfig) -> "SchedulerMixin":
    """Build the diffusers scheduler of the settings for rectified flow.

    Raises:
        ConfigError: There is none, or it lacks a setting that is asked for.
    """
    if sampler.scheduler is None:
        raise ConfigError(
            "sampler.scheduler must be one of rectified flow with diffusion.prediction_type "
            "flow_prediction, such as FlowMatchEulerDiscreteScheduler or "
            f"DPMSolverMultistepScheduler, got None ({sampler.name} steps by betas)."
        )
    kind = _class_of(sampler)
    if "use_flow_sigmas" not in inspect.signature(kind).parameters and not is_flow_class(kind):
        raise ConfigError(
            f"sampler.scheduler {kind.__name__} cannot sample rectified flow: it has no "
            "use_flow_sigmas. Use FlowMatchEulerDiscreteScheduler, for example."
        )
    ours = {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "prediction_type": diffusion.prediction_type,
        "use_flow_sigmas": True,
    }
    arguments = _without_betas(kind, sampler, ours)
    with _refused_by(f"sampler.scheduler {kind.__name__} cannot have these settings"):
        scheduler, trial = kind(**arguments), kind(**arguments)
    _check_prediction(trial, diffusion.prediction_type, sampler.num_inference_steps)
    _check_steps(scheduler, diffusion, sampler)
    _check_flow_sigmas(trial, kind)
    return scheduler


def _edm_scheduler(diffusion: DiffusionConfig, sampler: SamplerConfig) -> "SchedulerMixin":
    """Build the diffusers scheduler of the settings for a network with EDM's preconditioning.

    Raises:
        ConfigError: There is none, or it lacks a setting that is asked for.
    """
    kind = None if sampler.scheduler is None else _class_of(sampler)
    if kind is None or kind.__name__ not in EDM_SCHEDULERS:
        raise ConfigError(
            f"sampler.scheduler must be {' or '.join(EDM_SCHEDULERS)} with diffusion.sigma_data, "
            f"got {sampler.scheduler} ({sampler.name})."
        )
    for name in (one.partition("=")[0] for one in sampler.options):
        if name in EDM_FIELDS:
            flag = f"--diffusion.{name.replace('_', '-')}"
            raise ConfigError(f"sampler.options cannot set {name}: {flag} does.")
    names = ("num_train_timesteps", "prediction_type", *EDM_FIELDS)
    ours = {name: getattr(diffusion, name) for name in names}
    arguments = _without_betas(kind, sampler, ours)
    with _refused_by(f"sampler.scheduler {kind.__name__} cannot have these settings"):
        scheduler = kind(**arguments)
    _check_steps(scheduler, diffusion, sampler)
    return scheduler


def _without_betas(kind: Any, sampler: SamplerConfig, ours: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a scheduler's class: the base's, in place of them ours, and flags'.

    Raises:
        ConfigError: A flag asks for what the class lacks.
    """
    taken = inspect.signature(kind).parameters
    started = (sampler.of_base or {}) | ours
    return {name: value for name, value in started.items() if name in taken} | _asked(
        kind, sampler
    )


def is_flow_class(kind: type) -> bool:
    """Whether schedulers of a class are of rectified flow alone (FlowMatchEulerDiscrete...)."""
    taken = inspect.signature(kind).parameters
    is_of_betas = "trained_betas" in taken or hasattr(kind, "add_noise")
    return "num_train_timesteps" in taken and hasattr(kind, "scale_noise") and not is_of_betas


def reads_variance(kind: type) -> bool:
    """Whether schedulers of a class draw noise whose variance a network may have learned.

    Others may have the setting all the same, without a default: they cut such outputs to the first
    three channels, whatever the images have.
    """
    setting = inspect.signature(kind).parameters.get("variance_type")
    return setting is not None and isinstance(setting.default, str)


def _is_short(sampler: SamplerConfig) -> bool:
    """Whether a short name says all of a scheduler that the other flags do not."""
    changed = sampler.spacing is not None or sampler.karras_sigmas or sampler.options
    return sampler.scheduler is None and not changed


def _class_of(sampler: SamplerConfig) -> Any:
    """Return the class of the scheduler that is named.

    Raises:
        ConfigError: There is none, or it is for networks of another kind.
    """
    import diffusers

    name = str(sampler.scheduler)
    if name == BASE:
        if sampler.of_base is None:
            raise ConfigError(
                "sampler.scheduler base needs a base that comes with a scheduler of diffusers "
                "(--base). Name the scheduler's class, such as DDIMScheduler."
            )
        name = sampler.of_base["_class_name"]
    kind: Any = getattr(diffusers, name, None)
    if missing := getattr(kind, "_backends", None):  # a stand-in
        raise ConfigError(
            f"sampler.scheduler {name} needs {' and '.join(missing)}: pip install "
            f"{' '.join(missing)}."
        )
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        known = {one[:-9].lower(): one for one in dir(diffusers) if one.endswith("Scheduler")}
        close = get_close_matches(name.removesuffix("Scheduler").lower(), known, n=1)
        hint = f"did you mean {known[close[0]]}? " if close else ""
        raise ConfigError(
            f"sampler.scheduler must be a scheduler of diffusers, got {name}: {hint}Such are "
            "DDIMScheduler, EulerDiscreteScheduler and UniPCMultistepScheduler."
        )
    if "Inverse" in name:
        raise ConfigError(
            f"sampler.scheduler {name} goes from an image to noise, and must go from noise to the "
            f"image. Use {name.replace('Inverse', '')}."
        )
    return kind


def _check_betas(kind: Any) -> None:
    """Check that schedulers of a class step by betas.

    Raises:
        ConfigError: They do not.
    """
    name = kind.__name__
    if not {"trained_betas", "prediction_type"} <= set(inspect.signature(kind).parameters):
        raise ConfigError(
            f"sampler.scheduler {name} cannot sample a network that denoises at timesteps of a "
            "beta schedule: it takes none (those of flow matching, of EDM's and consistency "
            "models and of tokens do not). Use DDIMScheduler, for example."
        )


def _asked(kind: Any, sampler: SamplerConfig) -> dict[str, Any]:
    """Return the settings of a scheduler's class that flags ask for.

    Raises:
        ConfigError: It has none of a name, or none of such a type, or another flag is meant.
    """
    asked: dict[str, tuple[str, Any]] = {}
    if sampler.spacing is not None:
        asked["timestep_spacing"] = f"sampler.spacing {sampler.spacing}", sampler.spacing
    if sampler.karras_sigmas:
        asked["use_karras_sigmas"] = "sampler.karras_sigmas", True
    for option in sampler.options:
        setting, _, text = option.partition("=")
        if setting in SETTING_OF:
            raise ConfigError(f"sampler.options cannot set {setting}: {SETTING_OF[setting]} does.")
        if setting in asked:
            raise ConfigError(
                f"sampler.options {option} sets what {asked[setting][0]} has set. Leave one out."
            )
        asked[setting] = f"sampler.options {option}", _value(text)
    taken, name = inspect.signature(kind).parameters, kind.__name__
    for setting, (flag, value) in asked.items():
        if setting not in taken:
            raise ConfigError(f"{flag} does not go with {name}, which has no {setting}.")
        if not _fits(value, taken[setting].default):
            raise ConfigError(
                f"{flag} must be like diffusers' default {taken[setting].default!r} of {name}."
            )
    if sampler.spacing == "quadratic" and (
        "timesteps" not in inspect.signature(kind.set_timesteps).parameters
    ):
        raise ConfigError(
            f"sampler.spacing quadratic does not go with {name}, which takes no timesteps. DDIM's "
            "steps are those of DPMSolverMultistepScheduler with --sampler.options solver_order=1."
        )
    return {setting: value for setting, (_, value) in asked.items()}


def _value(text: str) -> Any:
    """Read a value of an option: JSON, or else a text."""
    if text in _LITERALS:
        return _LITERALS[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _fits(value: object, default: object) -> bool:
    """Whether a value is of the type of a default, where that says one."""
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number or not isinstance(default, int | float)


def _check_prediction(trial: "SchedulerMixin", predicts: PredictionType, num_steps: int) -> None:
    """Check by one step that a scheduler converts what a network predicts.

    Raises:
        ConfigError: It does not, or cannot take so many steps.
    """
    if predicts == "epsilon":  # all do
        return
    import torch

    set_timesteps(trial, num_steps)
    generator, x_t = torch.Generator().manual_seed(0), torch.zeros(1, 1, 1, 1)
    takes = inspect.signature(trial.step).parameters
    noise = {"generator": generator} if "generator" in takes else {}
    other = "FlowMatchEulerDiscrete" if predicts == "flow_prediction" else "DDIM"
    with _refused_by(
        f"sampler.scheduler {type(trial).__name__} cannot sample a network that predicts "
        f"{predicts} with these settings, use {other}Scheduler, for example"
    ):
        trial.step(x_t, trial.timesteps[0], x_t, **noise)


def _check_steps(
    scheduler: "SchedulerMixin", diffusion: DiffusionConfig, sampler: SamplerConfig
) -> None:
    """Check that a scheduler steps by what a network of images outputs, and by what is set.

    Raises:
        ConfigError: It needs more, lacks a setting, or reads a variance that is not learned.
    """
    name, step = type(scheduler).__name__, inspect.signature(scheduler.step).parameters
    needed = {key for key, one in step.items() if one.default is inspect.Parameter.empty}
    if more := needed - {"model_output", "timestep", "sample"}:
        raise ConfigError(
            f"sampler.scheduler {name} needs {', '.join(sorted(more))} beside what the network "
            "outputs. Use DDIMScheduler, for example."
        )
    if "noise_sampler_seed" in scheduler.config:
        raise ConfigError(
            f"sampler.scheduler {name} draws noise by no generator: an image would not be that of "
            "its seed. Use DPMSolverMultistepScheduler with --sampler.options "
            "algorithm_type=sde-dpmsolver++."
        )
    for setting, is_set in (
        ("eta", sampler.eta > 0),
        ("use_clipped_model_output", bool(sampler.use_clipped_model_output)),
    ):
        if is_set and setting not in step:
            raise ConfigError(
                f"sampler.{setting} does not go with {name}, which has none. Leave it out."
            )
    variance = scheduler.config.get("variance_type")
    if str(variance).startswith("learned") and not diffusion.learned_sigma:
        raise ConfigError(
            f"sampler.options variance_type={variance} needs diffusion.learned_sigma: the network "
            "predicts no variance."
        )


def _check_flow_sigmas(trial: "SchedulerMixin", kind: Any) -> None:
    """Check that a scheduler that is set goes from noise to the image by sigmas of rectified flow.

    Raises:
        ConfigError: It does not: other spacings of sigmas are for betas, whose sigmas have no end.
    """
    spacings = [name for name in OTHER_SIGMAS if trial.config.get(name)]
    if spacings and not is_flow_class(kind):
        raise ConfigError(
            f"sampler.scheduler {kind.__name__} with {spacings[0]} spaces sigmas of betas, and "
            "rectified flow has none. Leave that out, or use FlowMatchEulerDiscreteScheduler."
        )
    first, *_, last = trial.sigmas.tolist()
    if not 0 <= last < first <= 1:
        raise ConfigError(
            f"sampler.scheduler {kind.__name__} must go from noise to the image, from a sigma of "
            f"at most 1 to 0, got {first:.3g} to {last:.3g}. Use another."
        )


def _check_noise(scheduler: "SchedulerMixin", process: NoiseProcess) -> None:
    """Check that a scheduler keeps to the noise process that the network was trained on.

    Raises:
        ConfigError: It does not.
    """
    name, config = type(scheduler).__name__, scheduler.config
    others = [one for one, known in NEEDED.items() if config.get(one, known) != known]
    is_same = np.allclose(scheduler.alphas_cumprod, process.alphas_cumprod, rtol=1e-2, atol=1e-6)
    if others or not is_same:
        raise ConfigError(
            f"sampler.scheduler {name} has another noise process than the network was trained on"
            f"{' by ' if others else ''}{', '.join(others)}. Leave that out, or use another "
            "scheduler."
        )


@contextmanager
def _refused_by(what: str) -> Iterator[None]:
    """Turn what diffusers raises for settings that disagree into one error."""
    try:
        yield
    except (ImportError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{what}: {reason}") from error

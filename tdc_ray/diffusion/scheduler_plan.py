"""Plans for schedulers of diffusers: what ``tdc_ray.plan_groups`` is. Imports no framework."""

from typing import TYPE_CHECKING, Any, get_args, overload

import numpy as np

from tdc_ray.config.diffusion import BetaSchedule, DiffusionConfig
from tdc_ray.config.plan import FlopsSchedule, PlanConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion import plan
from tdc_ray.diffusion.plan import Plan
from tdc_ray.diffusion.samplers import (
    EDM_SCHEDULERS,
    begins_near_the_end,
    edm_process,
    is_flow_class,
    nearest_steps,
    timesteps_of,
)
from tdc_ray.diffusion.schedule import (
    NoiseProcess,
    betas_of,
    nearest_timestep,
    nearest_timesteps,
    zero_terminal,
)
from tdc_ray.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@overload
def plan_groups(diffusion: "SchedulerMixin", config: PlanConfig) -> Plan: ...


@overload
def plan_groups(  # PlanConfig's own settings and defaults, for editors to complete
    diffusion: "SchedulerMixin",
    *,
    num_groups: int = 10,
    min_macs_share: float = 0.5,
    schedule: FlopsSchedule = "snr",
    mean_macs_share: float | None = None,
    match_snr_mean: bool = False,
    min_group_size: int = 1,
) -> Plan: ...


@overload
def plan_groups(
    diffusion: DiffusionConfig,
    config: PlanConfig,
    sampler: SamplerConfig,
    *,
    check_start: bool = True,
) -> Plan: ...


def plan_groups(
    diffusion: Any,
    config: PlanConfig | None = None,
    sampler: SamplerConfig | None = None,
    **settings: Any,
) -> Plan:
    """Group the timesteps of a noise process, and compute the limit of each group.

    Args:
        diffusion: A scheduler of diffusers, such as ``base.scheduler``: it has the noise process,
            and its ``timesteps`` are those at which images are sampled (``set_timesteps`` changes
            them). Or a ``DiffusionConfig``, with ``config`` and ``sampler``; then this is
            ``diffusion.plan.plan_groups``.
        config: How the timesteps are grouped, in place of ``settings``.
        sampler: How images are sampled, beside a ``DiffusionConfig``.
        settings: Fields of ``PlanConfig``: ``num_groups``, ``min_macs_share``, ``schedule``, ...

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: A setting is unknown or out of its range, or the scheduler has no betas, or
            steps outside the timesteps or that begin far below the last one.
    """
    if isinstance(diffusion, DiffusionConfig):
        if config is None or sampler is None:
            raise ConfigError(
                "plan_groups of a DiffusionConfig needs a PlanConfig and a SamplerConfig; give a "
                "scheduler of diffusers where the settings are named one by one."
            )
        return plan.plan_groups(diffusion, config, sampler, **settings)
    process = process_of(diffusion)
    return plan.plan_of(process, config or PlanConfig(**settings), _steps(diffusion, process))


def process_of(scheduler: "SchedulerMixin") -> NoiseProcess:
    """Return the noise process of a scheduler, in float64 where its settings say the betas.

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: It has none.
    """
    if is_flow_class(type(scheduler)) or scheduler.config.get("use_flow_sigmas"):
        return NoiseProcess.flow(scheduler.config["num_train_timesteps"])
    if type(scheduler).__name__ in EDM_SCHEDULERS:
        return edm_process(scheduler)
    if not hasattr(scheduler, "betas"):
        raise ConfigError(
            f"the scheduler must have betas, got a {type(scheduler).__name__}: give one of a base "
            "that predicts epsilon or v_prediction, such as DDPMScheduler."
        )
    config = scheduler.config
    trained, schedule = config.get("trained_betas"), config.get("beta_schedule")
    if trained is not None:
        values = np.asarray(trained, dtype=np.float64)
    elif schedule in get_args(BetaSchedule):
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        values = betas_of(DiffusionConfig(**{name: config[name] for name in names}))
    else:
        return NoiseProcess.from_betas(np.asarray(scheduler.betas, dtype=np.float64))
    rescaled = config.get("rescale_betas_zero_snr", False)
    return NoiseProcess.from_betas(zero_terminal(values) if rescaled else values)


def _steps(scheduler: "SchedulerMixin", process: NoiseProcess) -> tuple[float, ...]:
    """Return the timesteps that a scheduler is set to, noisiest first."""
    total, steps = len(process.snr), timesteps_of(scheduler)
    if not all(0 <= step < total for step in nearest_timesteps(steps)):
        raise ConfigError(
            f"the steps of the scheduler must be within 0 and {total - 1}, got those of a "
            f"{type(scheduler).__name__} from {steps[0]} to {steps[-1]}: experts are chosen by "
            "timesteps. Use DDIMScheduler, for example."
        )
    if (
        process.betas is not None
        and not process.has_signal
        and nearest_timestep(steps[0]) != total - 1
    ):
        raise ConfigError(
            f"the steps of the scheduler must begin at {total - 1}, where nothing of the image is "
            f"left (rescale_betas_zero_snr), got {steps[0]:g}: give it timestep_spacing trailing."
        )
    # pndm makes one of them twice, Heun's nearly all
    count = getattr(scheduler, "num_inference_steps", None) or len(steps)
    is_quadratic = scheduler.config.get("timestep_spacing") == "quadratic"
    if not is_quadratic and not begins_near_the_end(total, count, steps[0]):
        raise ConfigError(
            f"set_timesteps of the scheduler must be {nearest_steps(total, count)}, got {count}: "
            f"of {total} timesteps it would begin at {steps[0]:g}, with pure noise. Or give it "
            "timestep_spacing trailing."
        )
    return steps

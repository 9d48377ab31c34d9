"""Plans for schedulers of diffusers: what ``tdc_ray.plan_groups`` is. Imports no framework."""

from typing import TYPE_CHECKING, Any, get_args, overload

import numpy as np

from tdc_ray.config.diffusion import BetaSchedule, DiffusionConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion import plan
from tdc_ray.diffusion.plan import Plan
from tdc_ray.diffusion.samplers import begins_near_the_end, nearest_steps
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@overload
def plan_groups(diffusion: "SchedulerMixin", **settings: Any) -> Plan: ...


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
            steps that are no whole timesteps or begin far below the last one.
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
    if not hasattr(scheduler, "betas"):
        raise ConfigError(
            f"the scheduler must have betas, got a {type(scheduler).__name__}: give one of a base "
            "that predicts epsilon or v_prediction, such as DDPMScheduler."
        )
    config = scheduler.config
    trained, schedule = config.get("trained_betas"), config.get("beta_schedule")
    is_named = schedule in get_args(BetaSchedule) and not config.get("rescale_betas_zero_snr")
    if trained is None and is_named:
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
        return NoiseProcess.of(DiffusionConfig(**{name: config[name] for name in names}))
    values = scheduler.betas if trained is None else trained
    return NoiseProcess.from_betas(np.asarray(values, dtype=np.float64))


def _steps(scheduler: "SchedulerMixin", process: NoiseProcess) -> tuple[int, ...]:
    """Return the timesteps that a scheduler is set to, noisiest first."""
    total, steps = len(process.betas), scheduler.timesteps.tolist()
    if any(step != int(step) or not 0 <= step < total for step in steps):
        raise ConfigError(
            f"the steps of the scheduler must be whole numbers from 0 to {total - 1}, got those "
            f"of a {type(scheduler).__name__} from {steps[0]} to {steps[-1]}: experts are chosen "
            "by timesteps. Use DDIMScheduler, for example."
        )
    count = scheduler.num_inference_steps or len(steps)  # pndm makes one of them twice
    if not begins_near_the_end(total, count, int(steps[0])):
        raise ConfigError(
            f"set_timesteps of the scheduler must be {nearest_steps(total, count)}, got {count}: "
            f"of {total} timesteps it would begin at {int(steps[0])}, with pure noise."
        )
    return tuple(map(int, steps))

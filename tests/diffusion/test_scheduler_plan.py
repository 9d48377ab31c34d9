import numpy as np
import pytest
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion import plan
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.scheduler_plan import plan_groups, process_of
from tdc_ray.errors import ConfigError

COSINE = DiffusionConfig(num_train_timesteps=400, beta_schedule="squaredcos_cap_v2")
LATENT = DiffusionConfig(num_train_timesteps=400, beta_schedule="scaled_linear")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "pndm", "dpmsolver++"])
@pytest.mark.parametrize("diffusion", [DiffusionConfig(beta_end=0.015), LATENT])
def test_a_plan_by_the_scheduler_is_that_by_the_settings(diffusion, sampler):
    how = SamplerConfig(sampler=sampler, num_inference_steps=20)
    scheduler = make_scheduler(diffusion, how)
    scheduler.set_timesteps(20)
    expected = plan.plan_groups(diffusion, PlanConfig(num_groups=4, min_macs_share=0.3), how)
    assert plan_groups(scheduler, num_groups=4, min_macs_share=0.3) == expected
    assert plan_groups(scheduler, PlanConfig(num_groups=4, min_macs_share=0.3)) == expected


def test_settings_plan_as_before():
    arguments = (COSINE, PlanConfig(num_groups=3), SamplerConfig(num_inference_steps=250))
    expected = plan.plan_groups(*arguments, check_start=False)
    assert plan_groups(*arguments, check_start=False) == expected
    named = dict(zip(("diffusion", "config", "sampler"), arguments, strict=True))
    assert plan_groups(**named, check_start=False) == expected
    with pytest.raises(ConfigError, match="be 200 or 400 for ddim, got 250"):
        plan_groups(*arguments)
    with pytest.raises(ConfigError, match="needs a PlanConfig and a SamplerConfig"):
        plan_groups(COSINE)


def test_schedulers_of_peoples_own_say_betas_by_name_or_one_by_one():
    named = process_of(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0015))
    config = DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.0015)
    np.testing.assert_array_equal(named.betas, plan.NoiseProcess.of(config).betas)
    betas = np.linspace(1e-4, 0.03, 50) ** 1.1
    given = process_of(DDIMScheduler(50, trained_betas=betas.tolist()))
    np.testing.assert_array_equal(given.betas, betas)
    sigmoid = DDPMScheduler(beta_schedule="sigmoid")
    np.testing.assert_allclose(process_of(sigmoid).betas, sigmoid.betas)


def set_to(scheduler, steps):
    scheduler.set_timesteps(steps)
    return scheduler


def test_steps_between_timesteps_count_for_the_group_of_the_nearer():
    scheduler = set_to(HeunDiscreteScheduler(use_karras_sigmas=True), 6)
    found = plan_groups(scheduler, num_groups=3)
    steps = found.sampling_timesteps
    assert len(steps) == 11  # every step but the last evaluates the network twice
    assert any(step != int(step) for step in steps)
    for group in found.groups:
        ours = [step for step in steps if group.first - 0.5 <= step < group.last + 0.5]
        assert (len(ours), [found.group_of(step) for step in ours]) == (
            group.num_sampling_steps,
            [group] * len(ours),
        )
    boundary = found.groups[1].first - 0.5
    assert found.group_of(boundary) is found.groups[1]
    assert found.group_of(boundary - 1e-3) is found.groups[0]
    total = sum(group.num_sampling_steps * group.limit_share for group in found.groups)
    assert found.mean_limit_share == pytest.approx(total / 11)


def test_a_scheduler_that_was_not_set_visits_all_timesteps():
    found = plan_groups(DDPMScheduler(100), num_groups=2)
    assert found.sampling_timesteps == tuple(range(99, -1, -1))
    assert [group.num_sampling_steps for group in found.groups] == [
        len(group.timesteps) for group in found.groups
    ]


@pytest.mark.parametrize(
    ("scheduler", "settings", "error", "words"),
    [
        (CMStochasticIterativeScheduler(), {}, ConfigError, "must have betas, got a CMStochastic"),
        (
            set_to(EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1), 1000),
            {},
            ConfigError,
            "within 0 and 999, got those of a EulerDiscreteScheduler from 1000",
        ),
        (set_to(DDIMScheduler(), 600), {}, ConfigError, "be 500 or 1000, got 600"),
        (set_to(DDIMScheduler(rescale_betas_zero_snr=True), 50), {}, ConfigError, "begin at 999"),
        (DDIMScheduler(), {"num_groups": 0}, ConfigError, "plan.num_groups must be at least 1"),
        (DDIMScheduler(), {"groups": 4}, ConfigError, "plan.groups"),
    ],
)
def test_bad_input_is_one_clear_error(scheduler, settings, error, words):
    with pytest.raises(error, match=words):
        plan_groups(scheduler, **settings)

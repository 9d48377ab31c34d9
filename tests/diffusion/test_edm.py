"""EDM's noise process and preconditioning, held against its formulas and diffusers' schedulers."""

import json
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from torch import Tensor

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.plan import plan_groups, to_json
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.diffusion.samplers import checked_timesteps, make_scheduler
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.diffusion.scheduler_plan import plan_groups as plan_of_scheduler
from tdc_ray.diffusion.train import start_state, train
from tdc_ray.errors import ConfigError
from tests.small import random_unet

SIGMA_DATA = 0.6
SETTINGS = {"sigma_data": SIGMA_DATA, "sigma_min": 0.01, "sigma_max": 50.0}
TIMESTEPS = torch.tensor([0, 200, 500, 800, 999])
SIGN = {"epsilon": 1, "v_prediction": -1}


def drawn() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, outputs ``(5, 1, 4, 4)``, and sigmas ``(5, 1, 1, 1)``."""
    x_0, epsilon, output = torch.randn(3, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    ramp = TIMESTEPS.double() / 999
    low, high = (SETTINGS[name] ** (1 / 7) for name in ("sigma_min", "sigma_max"))
    sigma = (low + ramp * (high - low)) ** 7  # equation 5
    return SIGMA_DATA * x_0, epsilon, output, sigma.float()[:, None, None, None]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_losses_inputs_and_conditioning_are_those_of_table_1(kind):
    schedule = noise_schedule(DiffusionConfig(prediction_type=kind, **SETTINGS))
    y, epsilon, output, sigma = drawn()
    batch, x = NoisedBatch(y, epsilon, TIMESTEPS), y + sigma * epsilon
    total = sigma**2 + SIGMA_DATA**2
    c_skip, c_out = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt()
    torch.testing.assert_close(batch.x_t(schedule), x / total.sqrt())
    torch.testing.assert_close(
        schedule.model_timesteps(TIMESTEPS), sigma.flatten().log() / 4, rtol=1e-5, atol=1e-6
    )
    denoised = c_skip * x + c_out * SIGN[kind] * output
    weight = total / (sigma * SIGMA_DATA).square()
    expected = weight * (denoised - y).square()
    losses = loss_per_image(schedule, output, batch)
    torch.testing.assert_close(losses, expected.mean((1, 2, 3)), rtol=1e-3, atol=1e-6)
    rates = schedule.rates(TIMESTEPS)
    found = schedule.prediction.to_x_0(output, batch.x_t(schedule), *rates)
    torch.testing.assert_close(found, denoised, rtol=1e-4, atol=1e-4)
    of_epsilon = ((x - denoised) / sigma - epsilon).square().mean((1, 2, 3))
    factor = schedule.prediction.per_epsilon(schedule.snr)[TIMESTEPS]
    torch.testing.assert_close(factor * losses, of_epsilon, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_inputs_outputs_and_conditioning_are_those_of_diffusers(scheduler_class, kind):
    scheduler = scheduler_class(prediction_type=kind, **SETTINGS)
    schedule = noise_schedule(DiffusionConfig(prediction_type=kind, **SETTINGS))
    y, epsilon, output, sigma = drawn()
    batch, x = NoisedBatch(y, epsilon, TIMESTEPS), y + sigma * epsilon
    x_t = batch.x_t(schedule)
    torch.testing.assert_close(x_t, scheduler.precondition_inputs(x, sigma))
    torch.testing.assert_close(
        schedule.model_timesteps(TIMESTEPS),
        scheduler.precondition_noise(sigma.flatten()),
        rtol=1e-5,
        atol=1e-6,
    )
    found = schedule.prediction.to_x_0(output, x_t, *schedule.rates(TIMESTEPS))
    expected = scheduler.precondition_outputs(x, output, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_plan_is_that_of_the_scheduler_by_sigmas(name):
    diffusion = DiffusionConfig(num_train_timesteps=200, **SETTINGS)
    how = SamplerConfig(scheduler=name, num_inference_steps=20)
    plan = plan_groups(diffusion, PlanConfig(num_groups=4), how)
    json.dumps(to_json(plan), allow_nan=False)
    assert (plan.groups[0].first, plan.groups[-1].last) == (0, 199)
    assert (plan.sampling_timesteps[0], plan.sampling_timesteps[-1]) == (199, 0)
    assert sum(group.num_sampling_steps for group in plan.groups) == 20
    np.testing.assert_allclose(plan.groups[0].snr_db_first, -20 * np.log10(0.01))
    scheduler = make_scheduler(diffusion, how)
    scheduler.set_timesteps(20)
    assert plan == plan_of_scheduler(scheduler, num_groups=4)
    assert NoiseProcess.of(diffusion).betas is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "must be EDMEulerScheduler or .* with diffusion.sigma_data, got None .ddim"),
        ({"scheduler": "DDIMScheduler"}, "must be EDMEulerScheduler or .* got DDIMScheduler"),
        (
            {"scheduler": "EDMEulerScheduler", "options": ("sigma_max=40",)},
            "cannot set sigma_max: --diffusion.sigma-max does",
        ),
        ({"scheduler": "EDMEulerScheduler", "spacing": "trailing"}, "has no timestep_spacing"),
    ],
)
def test_samplers_of_other_networks_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        checked_timesteps(DiffusionConfig(**SETTINGS), SamplerConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prediction_type": "sample"}, "prediction_type must be epsilon or v_prediction with"),
        ({"prediction_type": "flow_prediction"}, "prediction_type must be epsilon or"),
        ({"rescale_timesteps": True}, "rescale_timesteps must be False with diffusion.sigma_data"),
        ({"learned_sigma": True}, "learned_sigma must be False with diffusion.sigma_data"),
        ({"sigma_max": 0.001}, "sigma_max must be above sigma_min = 0.01"),
        ({"p_mean": 0.0}, "p_mean must be left out without diffusion.p_std"),
        ({"p_mean": np.nan, "p_std": 1.2}, "p_mean must be finite"),
        ({"p_std": 0.5}, "p_std must be finite and at least 0.852, so that every sigma"),
    ],
)
def test_settings_that_do_not_go_with_edm_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        DiffusionConfig(**{**SETTINGS, **settings})


def test_log_normal_sigmas_are_refused_without_edm():
    with pytest.raises(ConfigError, match=r"p_std must be left out without diffusion\.sigma_data"):
        DiffusionConfig(p_std=1.2)


LOG_NORMAL = DiffusionConfig(sigma_data=0.5, p_mean=-0.5, p_std=1.1)


def log_sigmas(config: DiffusionConfig, count: int, timesteps: range) -> Tensor:
    """Draw logarithms of sigmas as training does, ``(count,)``."""
    schedule = noise_schedule(config)
    drawn = schedule.draw_timesteps(count, timesteps, torch.Generator().manual_seed(0))
    assert timesteps.start <= drawn.min() <= drawn.max() < timesteps.stop
    return 4 * schedule.model_timesteps(drawn)


def test_training_draws_log_normal_sigmas_and_those_of_a_group_alone():
    drawn = log_sigmas(LOG_NORMAL, 100_000, range(1000))
    assert float(drawn.mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(drawn.std()) == pytest.approx(1.1, abs=0.02)
    seen = 4 * noise_schedule(LOG_NORMAL).conditioning
    group, normal = range(300, 400), NormalDist(-0.5, 1.1)
    first, middle, end = (normal.cdf(float(seen[place])) for place in (300, 350, 400))
    below = log_sigmas(LOG_NORMAL, 100_000, group) < seen[350]
    assert float(below.float().mean()) == pytest.approx((middle - first) / (end - first), abs=0.01)


def test_without_them_all_timesteps_are_drawn_equally_often_as_before():
    for config in (DiffusionConfig(), DiffusionConfig(sigma_data=0.5)):
        one, other = (torch.Generator().manual_seed(1) for _ in range(2))
        found = noise_schedule(config).draw_timesteps(50, range(200, 700), one)
        assert torch.equal(found, torch.randint(200, 700, (50,), generator=other))


@pytest.mark.parametrize(
    ("config", "mean"), [(LOG_NORMAL, -0.5), (DiffusionConfig(sigma_data=0.5), 0.37)]
)
def test_networks_are_trained_on_what_is_drawn(config, mean):
    smoke, seen = preset("digits-smoke"), []
    few = replace(smoke.base, num_steps=3)
    state = start_state(random_unet(), few)
    state.unet.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["timestep"]), with_kwargs=True
    )
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.full((64,), -1)
    train(
        state,
        state.unet,
        [images] * 3,
        noise_schedule(config),
        few,
        smoke.data,
        timesteps=range(1000),
        seed=0,
        report=lambda *_: None,
        save=lambda _: None,
    )
    assert float(4 * torch.cat(seen).mean()) == pytest.approx(mean, abs=0.3)

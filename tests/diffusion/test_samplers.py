from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.sampler import Sampler, SamplerConfig
from tdc_ray.diffusion.samplers import (
    SAMPLERS,
    checked_timesteps,
    make_scheduler,
    sampling_timesteps,
)
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.errors import ConfigError

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "pndm": PNDMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
}
LINEAR = DiffusionConfig()
COSINE = DiffusionConfig(
    num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2", rescale_timesteps=True
)
LATENT = DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)


def process_of(num_timesteps: int) -> NoiseProcess:
    return NoiseProcess.of(DiffusionConfig(num_train_timesteps=num_timesteps))


def test_every_sampler_of_the_settings_has_its_row():
    assert set(SAMPLERS) == set(SCHEDULERS) == set(get_args(Sampler))


@pytest.mark.parametrize("diffusion", [LINEAR, COSINE, LATENT], ids=["linear", "cosine", "latent"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_a_scheduler_has_the_betas_of_the_schedule(diffusion, sampler):
    scheduler = make_scheduler(diffusion, SamplerConfig(sampler=sampler))
    process = NoiseProcess.of(diffusion)
    assert isinstance(scheduler, SCHEDULERS[sampler])
    np.testing.assert_array_equal(scheduler.betas.numpy(), process.betas.astype(np.float32))
    np.testing.assert_allclose(scheduler.alphas_cumprod, process.alphas_cumprod, rtol=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("num_steps", "offset"), [(10, 0), (100, 0), (200, 1), (7, 0), (1000, 0), (2, 1), (1, 0)]
)
def test_the_sampler_visits_the_timesteps_of_the_plan(num_steps, offset, name):
    sampler = SamplerConfig(sampler=name, num_inference_steps=num_steps, steps_offset=offset)
    scheduler = make_scheduler(LINEAR, sampler)
    scheduler.set_timesteps(num_steps)
    assert tuple(scheduler.timesteps.tolist()) == sampling_timesteps(
        NoiseProcess.of(LINEAR), sampler
    )


def test_settings_reach_the_scheduler():
    latent = SamplerConfig(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    config = make_scheduler(LATENT, latent).config
    assert not config["clip_sample"]
    assert not config["set_alpha_to_one"]
    assert config["steps_offset"] == 1
    learned = DiffusionConfig(learned_sigma=True)
    ddpm = SamplerConfig(sampler="ddpm")
    assert make_scheduler(learned, ddpm).config["variance_type"] == "learned_range"
    assert make_scheduler(LINEAR, ddpm).config["variance_type"] == "fixed_small"


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize(
    ("num_timesteps", "num_steps"), [(1000, 100), (1000, 200), (4000, 100), (1000, 7), (10, 1)]
)
def test_sampling_timesteps_are_diffusers_leading_spacing(num_timesteps, num_steps, steps_offset):
    scheduler = DDIMScheduler(num_timesteps, timestep_spacing="leading", steps_offset=steps_offset)
    scheduler.set_timesteps(num_steps)
    sampler = SamplerConfig(num_inference_steps=num_steps, steps_offset=steps_offset)
    assert (
        list(sampling_timesteps(process_of(num_timesteps), sampler))
        == scheduler.timesteps.tolist()
    )


@given(st.integers(2, 500), st.data())
def test_any_number_of_steps_is_spaced_as_in_diffusers(num_timesteps, data):
    num_steps = data.draw(st.integers(1, num_timesteps))
    offset = data.draw(st.integers(0, 1))
    sampler = SamplerConfig(num_inference_steps=num_steps, steps_offset=offset)
    ours = sampling_timesteps(process_of(num_timesteps), sampler)
    assume(ours[0] < num_timesteps)
    scheduler = DDIMScheduler(num_timesteps, timestep_spacing="leading", steps_offset=offset)
    scheduler.set_timesteps(num_steps)
    assert list(ours) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm"])
@pytest.mark.parametrize(
    ("num_steps", "nearest", "first"),
    [(600, "500 or 1000", 599), (501, "500 or 1000", 500), (21, "20 or 25", 940)],
)
def test_steps_that_would_begin_far_below_the_last_timestep_are_refused(
    num_steps, nearest, first, name
):
    sampler = SamplerConfig(sampler=name, num_inference_steps=num_steps)
    words = rf"num_inference_steps must be {nearest} for {name}, got {num_steps}.* at {first},"
    with pytest.raises(ConfigError, match=words):
        checked_timesteps(NoiseProcess.of(LINEAR), sampler)
    solver = SamplerConfig(sampler="dpmsolver++", num_inference_steps=21)
    assert checked_timesteps(NoiseProcess.of(LINEAR), solver)[0] == 999


@pytest.mark.parametrize("num_steps", [5, 12, 20, 25, 50, 100])
@pytest.mark.parametrize("diffusion", [LINEAR, LATENT], ids=["linear", "latent"])
def test_the_solver_of_second_order_visits_the_timesteps_of_the_plan(diffusion, num_steps):
    sampler = SamplerConfig(sampler="dpmsolver++", num_inference_steps=num_steps)
    scheduler = make_scheduler(diffusion, sampler)
    scheduler.set_timesteps(num_steps)
    visited = sampling_timesteps(NoiseProcess.of(diffusion), sampler)
    assert visited == tuple(scheduler.timesteps.tolist())
    assert (visited[0], visited[-1]) == (999, 0)


def test_the_solver_of_second_order_refuses_a_first_timestep_that_comes_twice():
    sampler = SamplerConfig(sampler="dpmsolver++", num_inference_steps=20)
    with pytest.raises(ConfigError, match=r"^sampler\.num_inference_steps .* timestep 3999 twice"):
        sampling_timesteps(NoiseProcess.of(COSINE), sampler)


def test_the_solver_of_second_order_finds_a_point_in_fewer_steps():
    """Of normal images the best epsilon is known, and sampling scales the noise to them."""
    ends = {}
    for name, num_steps in (("ddim", 10), ("dpmsolver++", 10)):
        sampler = SamplerConfig(sampler=name, num_inference_steps=num_steps, clip_sample=False)
        scheduler = make_scheduler(LINEAR, sampler)
        scheduler.set_timesteps(num_steps)
        alphas_cumprod = NoiseProcess.of(LINEAR).alphas_cumprod
        x = torch.linspace(-3, 3, 7, dtype=torch.float64)
        for timestep in scheduler.timesteps.tolist():
            signal = alphas_cumprod[timestep]
            # x_0 is normal with variance 1/4: the exact mean of epsilon given x
            epsilon = x * (1 - signal) ** 0.5 / (1 - signal + signal / 4)
            x = scheduler.step(epsilon, timestep, x).prev_sample
        ends[name] = x
    exact = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    errors = {name: (end - exact).abs().max().item() for name, end in ends.items()}
    assert errors["dpmsolver++"] < 0.5 * errors["ddim"]

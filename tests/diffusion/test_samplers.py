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
    quadratic,
    sampling_timesteps,
    set_timesteps,
    timesteps_of,
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


def diffusion_of(num_timesteps: int) -> DiffusionConfig:
    return DiffusionConfig(num_train_timesteps=num_timesteps)


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
    assert tuple(scheduler.timesteps.tolist()) == sampling_timesteps(LINEAR, sampler)


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
        list(sampling_timesteps(diffusion_of(num_timesteps), sampler))
        == scheduler.timesteps.tolist()
    )


@given(st.integers(2, 500), st.data())
def test_any_number_of_steps_is_spaced_as_in_diffusers(num_timesteps, data):
    num_steps = data.draw(st.integers(1, num_timesteps))
    offset = data.draw(st.integers(0, 1))
    sampler = SamplerConfig(num_inference_steps=num_steps, steps_offset=offset)
    ours = sampling_timesteps(diffusion_of(num_timesteps), sampler)
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
        checked_timesteps(LINEAR, sampler)
    solver = SamplerConfig(sampler="dpmsolver++", num_inference_steps=21)
    assert checked_timesteps(LINEAR, solver)[0] == 999


@pytest.mark.parametrize("num_steps", [5, 12, 20, 25, 50, 100])
@pytest.mark.parametrize("diffusion", [LINEAR, LATENT], ids=["linear", "latent"])
def test_the_solver_of_second_order_visits_the_timesteps_of_the_plan(diffusion, num_steps):
    sampler = SamplerConfig(sampler="dpmsolver++", num_inference_steps=num_steps)
    scheduler = make_scheduler(diffusion, sampler)
    scheduler.set_timesteps(num_steps)
    visited = sampling_timesteps(diffusion, sampler)
    assert visited == tuple(scheduler.timesteps.tolist())
    assert (visited[0], visited[-1]) == (999, 0)


def test_the_solver_of_second_order_refuses_a_first_timestep_that_comes_twice():
    sampler = SamplerConfig(sampler="dpmsolver++", num_inference_steps=20)
    with pytest.raises(ConfigError, match=r"^sampler\.num_inference_steps .* timestep 3999 twice"):
        sampling_timesteps(COSINE, sampler)


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


def scheduler_of(name: str | None = None, **settings):
    return make_scheduler(LINEAR, SamplerConfig(scheduler=name, **settings))


def test_a_scheduler_by_its_class_is_diffusers_own_with_what_is_asked_for():
    options = ("solver_order=3", "algorithm_type=sde-dpmsolver++", "lower_order_final=False")
    name = "DPMSolverMultistepScheduler"
    scheduler = scheduler_of(name, spacing="trailing", karras_sigmas=True, options=options)
    config = scheduler.config
    assert type(scheduler) is DPMSolverMultistepScheduler
    assert config["timestep_spacing"] == "trailing"
    assert config["use_karras_sigmas"] is True
    assert (config["solver_order"], config["lower_order_final"]) == (3, False)
    assert config["algorithm_type"] == "sde-dpmsolver++"
    default = DPMSolverMultistepScheduler().config
    assert scheduler_of(name).config["timestep_spacing"] == default["timestep_spacing"]
    assert not scheduler_of(name).config["use_karras_sigmas"]


def test_a_short_name_takes_another_spacing_of_the_timesteps():
    trailing = SamplerConfig(spacing="trailing", num_inference_steps=600)
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(600)
    assert checked_timesteps(LINEAR, trailing) == tuple(scheduler.timesteps.tolist())
    assert make_scheduler(LINEAR, SamplerConfig(sampler="pndm", spacing="linspace")).config[
        "skip_prk_steps"
    ]
    solver = make_scheduler(LINEAR, SamplerConfig(sampler="dpmsolver++", spacing="linspace"))
    assert not solver.config["use_karras_sigmas"]  # by which the spacing would not count


def test_quadratic_spacing_is_that_of_ddims_code():
    roots = np.linspace(0, np.sqrt(1000 * 0.8), 20) ** 2  # ermongroup/ddim, skip_type "quad"
    expected = [int(root) for root in roots][::-1]
    for name, options in (
        ("DDPMScheduler", ()),
        ("DPMSolverMultistepScheduler", ("solver_order=1",)),
    ):
        how = {"scheduler": name, "options": options, "num_inference_steps": 20}
        sampler = SamplerConfig(**how, spacing="quadratic")
        assert list(checked_timesteps(LINEAR, sampler)) == expected
        later = SamplerConfig(**how, spacing="quadratic", steps_offset=1)
        assert list(checked_timesteps(LINEAR, later)) == [step + 1 for step in expected]
    many = quadratic(100, 50)
    assert (many[0], many[-1], len(many)) == (80, 0, len(set(many)))


@torch.no_grad()
def test_the_solver_of_first_order_steps_quadratically_as_ddim_does():
    """DDIM (arXiv:2010.02502, equation 12, sigma 0) from each timestep to the next below."""
    sampler = SamplerConfig(
        scheduler="DPMSolverMultistepScheduler", options=("solver_order=1",), spacing="quadratic"
    )
    scheduler = make_scheduler(LINEAR, sampler)
    set_timesteps(scheduler, 10)
    left, visited = NoiseProcess.of(LINEAR).alphas_cumprod, timesteps_of(scheduler)
    x = expected = torch.linspace(-2, 2, 7, dtype=torch.float64)
    for step, below in zip(visited, [*visited[1:], None], strict=True):
        now, then = left[step], 1.0 if below is None else left[below]
        x = scheduler.step(torch.sin(x), step, x).prev_sample
        x_0 = (expected - (1 - now) ** 0.5 * torch.sin(expected)) / now**0.5
        expected = then**0.5 * x_0 + (1 - then) ** 0.5 * torch.sin(expected)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_a_scheduler_starts_from_that_of_the_base():
    theirs = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "thresholding": True}
    same = scheduler_of("base", of_base=theirs)
    assert type(same) is DDPMScheduler
    assert (same.config["variance_type"], same.config["thresholding"]) == ("fixed_large", True)
    other = scheduler_of("DPMSolverMultistepScheduler", of_base=theirs)
    assert (other.config["variance_type"], other.config["thresholding"]) == (None, True)
    assert not scheduler_of("DDPMScheduler").config["thresholding"]
    assert not scheduler_of(of_base=theirs).config["thresholding"]  # a short name says all
    learned = make_scheduler(
        DiffusionConfig(learned_sigma=True), SamplerConfig(scheduler="DDPMScheduler")
    )
    assert learned.config["variance_type"] == "learned_range"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"scheduler": "DDIM"},
            "must be a scheduler of diffusers, got DDIM: did you mean DDIMSch",
        ),
        ({"scheduler": "ddim"}, "got ddim: did you mean DDIMScheduler"),
        ({"scheduler": "UNet2DModel"}, "must be a scheduler of diffusers, got UNet2DModel"),
        ({"scheduler": "base"}, "base needs a base that comes with a scheduler"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "those of flow matching"),
        (
            {"karras_sigmas": True},
            "karras_sigmas does not go with DDIMScheduler, which has no use",
        ),
        ({"spacing": "quadratic"}, "DDIMScheduler, which takes no timesteps.*solver_order=1"),
        (
            {"scheduler": "DPMSolverSinglestepScheduler", "spacing": "trailing"},
            "spacing trailing does not go with DPMSolverSinglestepScheduler",
        ),
        ({"options": ("order=3",)}, "options order=3 does not go with DDIMScheduler"),
        ({"options": ("thresholding=yes",)}, "thresholding=yes must be like .* False of DDIMSch"),
        ({"options": ("beta_start=1",)}, "cannot set beta_start: --diffusion.beta-start does"),
        ({"options": ("variance_type=learned",), "sampler": "ddpm"}, "needs diffusion.learned_si"),
        (
            {"options": ("rescale_betas_zero_snr=true",)},
            "cannot set rescale_betas_zero_snr: --diffusion.rescale-betas-zero-snr does",
        ),
        (
            {"scheduler": "UniPCMultistepScheduler", "options": ("solver_type=none",)},
            "UniPCMultistepScheduler cannot have these settings: none is not implemented",
        ),
        ({"scheduler": "EulerDiscreteScheduler", "eta": 0.5}, "eta does not go with EulerDiscre"),
        (
            {"scheduler": "DDPMScheduler", "use_clipped_model_output": True},
            "use_clipped_model_output does not go with DDPMScheduler",
        ),
        ({"scheduler": "LCMScheduler"}, "LCMScheduler cannot take 100 steps"),
        (
            {"spacing": "leading", "num_inference_steps": 5_000},
            r"num_inference_steps must be at most .*num_train_timesteps = \d+, got 5000",
        ),
        (
            {"spacing": "trailing", "num_inference_steps": 61},
            r"must be another number for ddim \(trailing\), got 61: .* at timestep -1",
        ),
        (
            {"scheduler": "EulerDiscreteScheduler", "karras_sigmas": True}
            | {"options": ("sigma_max=1",)},
            "must let EulerDiscreteScheduler .* begin near timestep 999: .* at 258",
        ),
    ],
)
def test_a_scheduler_that_cannot_be_had_is_one_clear_error(settings, words):
    with pytest.raises(ConfigError, match=words):
        checked_timesteps(LINEAR, SamplerConfig(**settings))

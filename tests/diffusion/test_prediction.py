"""What networks predict, held against data whose best prediction is known in closed form."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tdc_ray.config.diffusion import DiffusionConfig, PredictionType
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.loss import loss_per_image, loss_weights
from tdc_ray.diffusion.plan import plan_groups, to_json
from tdc_ray.diffusion.prediction import PREDICTIONS
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.diffusion.samplers import checked_timesteps, make_scheduler
from tdc_ray.diffusion.sampling import SamplingSpec, image_generators, sample
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.diffusion.scheduler_plan import plan_groups as plan_of_scheduler
from tdc_ray.errors import ConfigError

MEAN, DEVIATION = 0.3, 0.25
"""Of every pixel of the data, which are Gaussian."""

SHAPE = (1, 4, 4)
KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
"""Of networks on the betas' process."""


class Best:
    """The best denoiser of the Gaussian data: what it outputs implies E[x_0 | x_t]."""

    def __init__(self, diffusion: DiffusionConfig) -> None:
        schedule = noise_schedule(diffusion)
        self.signal, self.noise = schedule.signal.double(), schedule.noise.double()
        self.prediction, self.diffusion = schedule.prediction, diffusion

    def __call__(self, x_t: Tensor, *, timestep: Tensor) -> SimpleNamespace:
        if self.diffusion.is_flow:
            noise = timestep.double() / self.diffusion.num_train_timesteps
            signal = 1 - noise
        else:
            signal, noise = self.signal[timestep.long()], self.noise[timestep.long()]
        signal, noise = signal[:, None, None, None], noise[:, None, None, None]
        x_t = x_t.double()
        variance = DEVIATION**2
        gain = signal * variance / (signal**2 * variance + noise**2)
        x_0 = MEAN + gain * (x_t - signal * MEAN)
        output = self.prediction.target(x_0, (x_t - signal * x_0) / noise, signal, noise)
        return SimpleNamespace(sample=output.float())


def draw(diffusion: DiffusionConfig, sampler: SamplerConfig, count: int = 4) -> Tensor:
    spec = SamplingSpec(
        shape=SHAPE,
        num_inference_steps=sampler.num_inference_steps,
        use_clipped_model_output=sampler.clips_epsilon,
    )
    scheduler, best = make_scheduler(diffusion, sampler), Best(diffusion)
    return sample(lambda _: best, scheduler, spec, image_generators(0, 0, count))


def exact(signal: float, noise: float, count: int = 4) -> Tensor:
    """Where the probability flow from the sampler's noise ends, at the data."""
    x = torch.stack([torch.randn(SHAPE, generator=g) for g in image_generators(0, 0, count)])
    deviation = np.sqrt(signal**2 * DEVIATION**2 + noise**2)
    return MEAN + DEVIATION * (x - signal * MEAN) / deviation


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(clip_sample=False, num_inference_steps=20),
        SamplerConfig(sampler="ddpm", clip_sample=False, num_inference_steps=20),
        SamplerConfig(sampler="dpmsolver++", spacing="leading", num_inference_steps=20),
        SamplerConfig(
            scheduler="UniPCMultistepScheduler", spacing="leading", num_inference_steps=20
        ),
        SamplerConfig(
            scheduler="EulerDiscreteScheduler", spacing="leading", num_inference_steps=20
        ),
    ],
    ids=lambda sampler: sampler.name,
)
def test_the_best_denoiser_draws_the_same_images_whatever_it_predicts(sampler):
    images = [draw(DiffusionConfig(prediction_type=kind), sampler) for kind in KINDS]
    for others in images[1:]:
        torch.testing.assert_close(others, images[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_are_those_of_the_probability_flow(kind):
    diffusion = DiffusionConfig(prediction_type=kind)
    images = draw(
        diffusion,
        SamplerConfig(sampler="dpmsolver++", spacing="trailing", num_inference_steps=100),
    )
    schedule = noise_schedule(diffusion)
    expected = exact(float(schedule.signal[-1]), float(schedule.noise[-1]))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-2)


FLOW = DiffusionConfig(prediction_type="flow_prediction")


@pytest.mark.parametrize(
    ("scheduler", "options", "atol"),
    [
        ("FlowMatchEulerDiscreteScheduler", (), 2e-2),
        ("FlowMatchEulerDiscreteScheduler", ("shift=3",), 4e-2),
        ("FlowMatchHeunDiscreteScheduler", (), 5e-3),
        ("DPMSolverMultistepScheduler", (), 2e-2),
        ("UniPCMultistepScheduler", ("flow_shift=3",), 2e-2),
    ],
)
def test_rectified_flow_draws_the_images_of_the_probability_flow(scheduler, options, atol):
    how = SamplerConfig(scheduler=scheduler, options=options, num_inference_steps=100)
    torch.testing.assert_close(draw(FLOW, how), exact(0.0, 1.0), rtol=0, atol=atol)


def test_rectified_flow_mixes_as_diffusers_at_its_timesteps():
    scheduler, schedule = FlowMatchEulerDiscreteScheduler(), noise_schedule(FLOW)
    x_0, epsilon = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1, 400, 1000])
    expected = scheduler.scale_noise(x_0, timesteps.float(), epsilon)
    torch.testing.assert_close(schedule.add_noise(x_0, epsilon, timesteps), expected)
    s = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(NoiseProcess.of(FLOW).snr[1:], ((1 - s) / s) ** 2)
    assert NoiseProcess.of(FLOW).snr[0] < np.inf


@pytest.mark.parametrize("options", [(), ("shift=3",)])
def test_a_plan_of_rectified_flow_serves_every_timestep_that_is_visited(options):
    how = SamplerConfig(
        scheduler="FlowMatchEulerDiscreteScheduler", options=options, num_inference_steps=30
    )
    plan = plan_groups(FLOW, PlanConfig(num_groups=4), how)
    json.dumps(to_json(plan), allow_nan=False)
    assert plan.num_train_timesteps == 1001
    assert plan.groups[-1].last == plan.sampling_timesteps[0] == 1000
    assert sum(group.num_sampling_steps for group in plan.groups) == 30
    scheduler = make_scheduler(FLOW, how)
    scheduler.set_timesteps(30)
    assert plan == plan_of_scheduler(scheduler, num_groups=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {},
            "must be one of rectified flow with .* such as FlowMatchEulerDiscrete.*got None .ddim",
        ),
        ({"scheduler": "DDIMScheduler"}, "DDIMScheduler cannot sample rectified flow"),
        (
            {
                "scheduler": "FlowMatchEulerDiscreteScheduler",
                "options": ("use_dynamic_shifting=true",),
            },
            "cannot take 100 steps: `mu` must be passed",
        ),
        (
            {"scheduler": "FlowMatchEulerDiscreteScheduler", "spacing": "trailing"},
            "trailing does not go with FlowMatchEulerDiscreteScheduler",
        ),
    ],
)
def test_samplers_of_other_processes_are_refused_for_rectified_flow(settings, words):
    with pytest.raises(ConfigError, match=words):
        checked_timesteps(FLOW, SamplerConfig(**settings))


NO_SIGNAL = DiffusionConfig(prediction_type="sample", rescale_betas_zero_snr=True)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
def test_without_signal_at_the_end_the_best_denoisers_draw_the_same_images(scheduler):
    how = SamplerConfig(
        scheduler=scheduler, spacing="trailing", clip_sample=False, num_inference_steps=200
    )
    images, others = (
        draw(replace(NO_SIGNAL, prediction_type=kind), how) for kind in ("sample", "v_prediction")
    )
    torch.testing.assert_close(others, images, rtol=0, atol=2e-3)
    if scheduler == "DDIMScheduler":
        torch.testing.assert_close(images, exact(0.0, 1.0), rtol=0, atol=3e-2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "spacing must be trailing for ddim .* begin at 990"),
        ({"scheduler": "HeunDiscreteScheduler"}, "has no rescale_betas_zero_snr"),
        ({"scheduler": "DDIMScheduler"}, "spacing must be trailing"),
        ({"sampler": "dpmsolver++"}, "spacing must be trailing"),
    ],
)
def test_samplers_that_do_not_begin_without_signal_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        checked_timesteps(NO_SIGNAL, SamplerConfig(**settings))


def test_epsilon_says_nothing_where_there_is_no_signal():
    with pytest.raises(ConfigError, match="prediction_type must be v_prediction or sample with"):
        DiffusionConfig(rescale_betas_zero_snr=True)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++"])
def test_a_plan_without_signal_at_the_end_is_finite_json(sampler):
    how = SamplerConfig(sampler=sampler, spacing="trailing", num_inference_steps=10)
    plan = plan_groups(NO_SIGNAL, PlanConfig(num_groups=5), how)
    assert json.loads(json.dumps(to_json(plan), allow_nan=False))["groups"]
    assert plan.group_of(999) is plan.groups[-1]
    assert plan.sampling_timesteps[0] == 999


@pytest.mark.parametrize("weight", ["min-snr", "p2"])
def test_weights_without_signal_are_numbers(weight):
    for kind in ("sample", "v_prediction"):
        schedule = noise_schedule(replace(NO_SIGNAL, prediction_type=kind, learned_sigma=True))
        weights = loss_weights(schedule, weight, None)
        assert weights.isfinite().all()
        output = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        batch = NoisedBatch(output[:, :1], output[:, 1:], torch.tensor([998, 999]))
        assert loss_per_image(schedule, output, batch, weights=weights).isfinite().all()


@pytest.mark.parametrize("kind", get_args(PredictionType))
@pytest.mark.parametrize("weight", ["constant", "min-snr", "p2"])
def test_gradients_of_the_loss_are_those_of_the_formula(kind, weight):
    diffusion = DiffusionConfig(prediction_type=kind)
    schedule, generator = noise_schedule(diffusion), torch.Generator().manual_seed(0)
    x_0, epsilon, output = torch.randn(3, 5, *SHAPE, generator=generator)
    timesteps = torch.tensor([0, 10, 300, 700, 999])
    signal, noise = schedule.rates(timesteps)
    target = {
        "epsilon": epsilon,
        "v_prediction": signal * epsilon - noise * x_0,
        "sample": x_0,
        "flow_prediction": epsilon - x_0,
    }[kind]
    snr = (signal / noise).square()
    of_epsilon = {
        "constant": torch.ones_like(snr),
        "min-snr": (5 / snr).clamp(max=1),
        "p2": 1 / (1 + snr),
    }[weight]
    error_of_epsilon = {
        "epsilon": torch.ones_like(snr),
        "v_prediction": signal,
        "sample": signal / noise,
        "flow_prediction": signal,
    }[kind]
    factor = of_epsilon * (1 if weight == "constant" else error_of_epsilon.square())
    output.requires_grad_()
    weights = loss_weights(schedule, weight, None)
    losses = loss_per_image(
        schedule, output, NoisedBatch(x_0, epsilon, timesteps), weights=weights
    )
    torch.testing.assert_close(
        losses, (factor * (output - target).square()).mean((1, 2, 3)), rtol=1e-4, atol=1e-9
    )
    losses.sum().backward()
    expected = 2 * factor * (output.detach() - target) / output[0].numel()
    torch.testing.assert_close(output.grad, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_an_error_of_epsilon_is_told_by_that_of_the_output(kind):
    schedule = noise_schedule(DiffusionConfig(prediction_type=kind))
    timesteps = torch.tensor([5, 300, 900])
    signal, noise = (rates.double() for rates in schedule.rates(timesteps))
    x_t, output, error = torch.randn(
        3, 3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def epsilon_of(output: Tensor) -> Tensor:
        x_0 = PREDICTIONS[kind].to_x_0(output, x_t, signal, noise)
        epsilon = (x_t - signal * x_0) / noise
        again = PREDICTIONS[kind].target(x_0, epsilon, signal, noise)
        torch.testing.assert_close(again, output, rtol=0, atol=1e-4)  # rates are of float32
        return epsilon

    found = (epsilon_of(output + error) - epsilon_of(output)).square()
    factor = PREDICTIONS[kind].per_epsilon(schedule.snr)[timesteps][:, None, None, None]
    torch.testing.assert_close(found, factor * error.square(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        ({"sampler": "pndm", "spacing": "linspace"}, "PNDMScheduler cannot sample a network that"),
        ({"scheduler": "PNDMScheduler"}, "predicts sample with these settings, use DDIMScheduler"),
    ],
)
def test_schedulers_that_cannot_convert_an_image_are_refused_before_work_starts(sampler, words):
    with pytest.raises(ConfigError, match=words):
        make_scheduler(DiffusionConfig(prediction_type="sample"), SamplerConfig(**sampler))

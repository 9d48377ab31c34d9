"""Sampling from a converted checkpoint against improved-diffusion's DDIM loop, written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tdc_ray.config.presets import preset
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.sampling import SamplingSpec, image_generators, sample
from tdc_ray.models.checkpoints.openai import config_from_state_dict, to_diffusers
from tdc_ray.models.unet2d.architectures import with_heads
from tdc_ray.models.unet2d.unet import build_unet
from tests.models.checkpoints.openai_reference import OpenAIUNet, randomise

CONFIG = preset("cifar10-cosine")
SHAPE = (3, 8, 8)
NUM_IMAGES = 2


@pytest.fixture(scope="module")
def original() -> OpenAIUNet:
    torch.manual_seed(0)
    return randomise(OpenAIUNet(), 0)


def cosine_alphas_cumprod(num_timesteps: int) -> np.ndarray:
    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = np.arange(num_timesteps) / num_timesteps
    ratios = [alpha_bar(t + 1 / num_timesteps) / alpha_bar(t) for t in steps]
    return np.cumprod(1 - np.minimum(1 - np.array(ratios), 0.999))


@torch.inference_mode()
def ddim(model: OpenAIUNet, x: Tensor, *, num_steps: int, num_timesteps: int) -> Tensor:
    """Uniform stride, eta 0, clipping, epsilon computed again from the clipped image, the first
    three of six channels, timesteps brought to 1000."""
    stride = num_timesteps // num_steps
    alphas = cosine_alphas_cumprod(num_timesteps)[::stride]
    before = np.append(1.0, alphas[:-1])
    for step in reversed(range(num_steps)):
        timestep = step * stride * (1000.0 / num_timesteps)
        epsilon = model(x, torch.full((len(x),), timestep))[:, :3]
        a, a_before = float(alphas[step]), float(before[step])
        x_0 = (math.sqrt(1 / a) * x - math.sqrt(1 / a - 1) * epsilon).clamp(-1, 1)
        epsilon = (math.sqrt(1 / a) * x - x_0) / math.sqrt(1 / a - 1)
        x = x_0 * math.sqrt(a_before) + math.sqrt(1 - a_before) * epsilon
    return x


def ours(original: OpenAIUNet, **diffusion: object) -> Tensor:
    settings = with_heads(config_from_state_dict(original.state_dict()), 4)
    unet = build_unet({**settings, "sample_size": SHAPE[1]}).eval()
    unet.load_state_dict(to_diffusers(original.state_dict(), settings))
    changed = replace(CONFIG.diffusion, **diffusion)
    spec = SamplingSpec(
        shape=SHAPE,
        num_inference_steps=CONFIG.sampler.num_inference_steps,
        eta=CONFIG.sampler.eta,
        use_clipped_model_output=CONFIG.sampler.clips_epsilon,
        timestep_scale=changed.timestep_scale,
    )
    generators = image_generators(0, 0, NUM_IMAGES)
    return sample(lambda _: unet, make_scheduler(changed, CONFIG.sampler), spec, generators)


@pytest.fixture(scope="module")
def theirs(original) -> Tensor:
    noise = [torch.randn(SHAPE, generator=g) for g in image_generators(0, 0, NUM_IMAGES)]
    return ddim(original, torch.stack(noise), num_steps=100, num_timesteps=4000)


@pytest.mark.slow
def test_a_hundred_steps_of_ddim_are_those_of_improved_diffusion(original, theirs):
    assert CONFIG.sampler.num_inference_steps == 100
    assert theirs.std() > 0.1
    assert (ours(original) - theirs).abs().max() < 1e-4


def test_timesteps_that_are_not_rescaled_give_other_images(original, theirs):
    assert (ours(original, rescale_timesteps=False) - theirs).abs().max() > 1e-2

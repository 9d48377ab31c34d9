from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, SchedulerMixin
from torch import Tensor, nn

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.data.batches import to_minus_one_one
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.sampling import SamplingSpec, image_generators, sample, to_uint8
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.errors import ConfigError
from tests.small import TINY, assert_same, random_unet

SHAPE = (1, 8, 8)
LINEAR = DiffusionConfig()
COSINE = DiffusionConfig(
    num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2", rescale_timesteps=True
)


def spec_of(num_inference_steps: int, **others: Any) -> SamplingSpec:
    return SamplingSpec(shape=SHAPE, num_inference_steps=num_inference_steps, **others)


def draw(
    unet: nn.Module,
    diffusion: DiffusionConfig = LINEAR,
    sampler: SamplerConfig | None = None,
    *,
    first: int = 0,
    count: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    sampler = sampler or SamplerConfig(num_inference_steps=10)
    spec = spec_of(
        sampler.num_inference_steps,
        eta=sampler.eta,
        use_clipped_model_output=sampler.clips_epsilon,
        dtype=dtype,
        timestep_scale=diffusion.timestep_scale,
    )
    generators = image_generators(0, first, count)
    return sample(lambda _: unet, make_scheduler(diffusion, sampler), spec, generators)


class Recorder(nn.Module):
    """Passes everything on and remembers what it saw."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        self.seen.append((x.clone(), timestep))
        return self.unet(x, timestep)


@torch.no_grad()
def ddim_by_hand(
    unet: nn.Module, diffusion: DiffusionConfig, num_steps: int, count: int
) -> Tensor:
    """DDIM (arXiv:2010.02502, equation 12, sigma 0), x_0 clipped, epsilon re-derived."""
    alpha_bar = NoiseProcess.of(diffusion).alphas_cumprod
    stride = diffusion.num_train_timesteps // num_steps
    noise = [torch.randn(SHAPE, generator=g) for g in image_generators(0, 0, count)]
    x = torch.stack(noise).double().numpy()
    for timestep in range(diffusion.num_train_timesteps - stride, -1, -stride):
        seen = torch.full((count,), timestep * diffusion.timestep_scale)
        epsilon = unet(torch.from_numpy(x).float(), seen).sample.double().numpy()
        now = alpha_bar[timestep]
        before = alpha_bar[timestep - stride] if timestep >= stride else 1.0
        x_0 = np.clip((x - np.sqrt(1 - now) * epsilon) / np.sqrt(now), -1, 1)
        epsilon = (x - np.sqrt(now) * x_0) / np.sqrt(1 - now)
        x = np.sqrt(before) * x_0 + np.sqrt(1 - before) * epsilon
    return torch.from_numpy(x)


@pytest.mark.parametrize("diffusion", [LINEAR, COSINE], ids=["linear", "cosine-4000"])
@pytest.mark.parametrize("num_steps", [10, 100])
def test_ddim_is_the_papers_update_with_a_clipped_image(diffusion, num_steps):
    unet = random_unet()
    images = draw(unet, diffusion, SamplerConfig(num_inference_steps=num_steps))
    expected = ddim_by_hand(unet, diffusion, num_steps, count=2)
    assert (images - expected).abs().max() < 1e-4
    assert images.std() > 0.1
    assert images.dtype == torch.float32


def test_every_evaluation_of_a_sampler_is_counted_in_the_group_that_serves_it():
    sampler = SamplerConfig(sampler="pndm", num_inference_steps=10)
    plan, unet, asked = plan_groups(LINEAR, PlanConfig(num_groups=4), sampler), random_unet(), []

    def denoiser_for(timestep: int) -> nn.Module:
        asked.append(plan.group_of(timestep).index)
        return unet

    sample(
        denoiser_for,
        make_scheduler(LINEAR, sampler),
        spec_of(10),
        image_generators(0, 0, 1),
    )
    assert len(asked) == len(plan.sampling_timesteps) == 11
    assert [asked.count(g.index) for g in plan.groups] == [
        group.num_sampling_steps for group in plan.groups
    ]


@torch.no_grad()
def pndm_by_hand(unet: nn.Module, num_steps: int, count: int) -> Tensor:
    """F-PNDM's transfer (arXiv:2202.09778, equation 11) with linear multistep after one Heun
    step; written with the noise's share sqrt(1 / alpha_bar - 1), whose change epsilon drives."""
    # The last is that of timestep -1.
    left = np.append(NoiseProcess.of(LINEAR).alphas_cumprod, 1.0)
    stride = 1000 // num_steps
    x = torch.cat([torch.randn(1, *SHAPE, generator=g) for g in image_generators(0, 0, count)])
    x, history = x.double(), []

    def epsilon(x: Tensor, timestep: int) -> Tensor:
        return unet(x.float(), torch.full((count,), timestep)).sample.double()

    def move(x: Tensor, epsilon: Tensor, start: int, end: int) -> Tensor:
        shares = [np.sqrt(1 / left[t] - 1) for t in (start, end)]
        return np.sqrt(left[end]) * (x / np.sqrt(left[start]) + (shares[1] - shares[0]) * epsilon)

    for timestep in range((num_steps - 1) * stride, -1, -stride):
        end = max(timestep - stride, -1)
        history = [*history[-3:], epsilon(x, timestep)]
        e = history[::-1]
        if len(e) == 1:
            guess = move(x, e[0], timestep, end)
            slope = (e[0] + epsilon(guess, end)) / 2
        elif len(e) == 2:
            slope = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            slope = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            slope = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        x = move(x, slope, timestep, end)
    return x


@pytest.mark.parametrize("num_steps", [3, 20])
def test_pndm_is_the_linear_multistep_method(num_steps):
    unet, sampler = random_unet(), SamplerConfig(sampler="pndm", num_inference_steps=num_steps)
    images, expected = draw(unet, LINEAR, sampler), pndm_by_hand(unet, num_steps, count=2)
    # Nothing clips, so images of an untrained network are large.
    assert (images - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    "sampler",
    [
        SamplerConfig(num_inference_steps=10),
        SamplerConfig(num_inference_steps=10, eta=1.0),
        SamplerConfig(num_inference_steps=10, sampler="ddpm"),
        SamplerConfig(num_inference_steps=9, sampler="pndm"),  # 10 evaluations
    ],
    ids=["ddim", "ddim-eta-1", "ddpm", "pndm"],
)
def test_an_image_does_not_depend_on_how_images_are_batched(sampler):
    recorder = Recorder(random_unet())
    together = draw(recorder, sampler=sampler, count=4)
    noise = recorder.seen[0][0]
    recorder.seen.clear()
    apart = [draw(recorder, sampler=sampler, first=i, count=1) for i in range(4)]
    assert_same(torch.cat([x for x, _ in recorder.seen[::10]]), noise)
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def first_draws(seed: int, first: int, count: int) -> list[float]:
    generators = image_generators(seed, first, count)
    return [torch.rand(1, generator=g, dtype=torch.float64).item() for g in generators]


def test_every_image_has_noise_of_its_own_wherever_its_batch_begins():
    assert len(set(first_draws(0, first=0, count=100))) == 100
    assert first_draws(0, first=0, count=100)[60:] == first_draws(0, first=60, count=40)


def test_the_images_of_another_seed_have_other_noise():
    numbers = [number for seed in range(3) for number in first_draws(seed, first=0, count=10)]
    assert len(set(numbers)) == 30


class FirstHalf(nn.Module):
    """Outputs the first half of the channels alone."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.unet(x, timestep).sample.chunk(2, dim=1)[0])


def with_other_variance(unet: nn.Module) -> nn.Module:
    with torch.no_grad():
        unet.conv_out.bias[1] += 1.0
    return unet


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_ddim_and_pndm_drop_the_channels_of_the_variance(name):
    learned, config = DiffusionConfig(learned_sigma=True), {**TINY, "out_channels": 2}
    sampler = SamplerConfig(sampler=name, num_inference_steps=10)
    images = draw(random_unet(config), learned, sampler)
    assert images.shape == (2, *SHAPE)
    assert_same(draw(FirstHalf(random_unet(config)), learned, sampler), images)
    assert_same(draw(with_other_variance(random_unet(config)), learned, sampler), images)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, PNDMScheduler])
def test_a_scheduler_made_from_one_with_a_learned_variance_drops_its_channels(scheduler_class):
    ddpm = make_scheduler(DiffusionConfig(learned_sigma=True), SamplerConfig(sampler="ddpm"))
    scheduler = scheduler_class.from_config(ddpm.config)
    unet = random_unet({**TINY, "out_channels": 2})
    images = sample(
        lambda _: unet,
        scheduler,
        spec_of(5),
        image_generators(0, 0, 2),
    )
    assert images.shape == (2, *SHAPE)


def test_ddpm_uses_the_channels_of_the_variance():
    learned, config = DiffusionConfig(learned_sigma=True), {**TINY, "out_channels": 2}
    ddpm = SamplerConfig(sampler="ddpm", num_inference_steps=10)
    images = draw(random_unet(config), learned, ddpm)
    assert images.shape == (2, *SHAPE)
    assert images.isfinite().all()
    other = draw(with_other_variance(random_unet(config)), learned, ddpm)
    assert not torch.allclose(other, images, atol=1e-3)
    fixed = draw(FirstHalf(random_unet(config)), LINEAR, ddpm)
    assert not torch.allclose(fixed, images, atol=1e-3)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
def test_the_denoiser_is_chosen_by_the_discrete_timestep(scheduler_class):
    asked, used = [], []
    unets = {name: Recorder(random_unet(seed=place)) for place, name in enumerate("ab")}

    def denoiser_for(timestep: int) -> nn.Module:
        assert isinstance(timestep, int)
        asked.append(timestep)
        used.append("a" if timestep < 300 else "b")
        return unets[used[-1]]

    scheduler: SchedulerMixin = scheduler_class.from_config(
        make_scheduler(LINEAR, SamplerConfig()).config
    )
    sample(
        denoiser_for,
        scheduler,
        spec_of(10),
        image_generators(0, 0, 2),
    )
    assert asked == list(range(900, -1, -100))
    assert used == ["b"] * 7 + ["a"] * 3
    seen = {name: [t.tolist() for _, t in unet.seen] for name, unet in unets.items()}
    assert seen == {
        "b": [[t, t] for t in range(900, 299, -100)],
        "a": [[t, t] for t in range(200, -1, -100)],
    }


def test_the_network_sees_scaled_timesteps_and_the_denoiser_is_chosen_by_unscaled_ones():
    recorder, asked = Recorder(random_unet()), []

    def denoiser_for(timestep: int) -> nn.Module:
        asked.append(timestep)
        return recorder

    sample(
        denoiser_for,
        make_scheduler(COSINE, SamplerConfig()),
        spec_of(3, timestep_scale=COSINE.timestep_scale),
        image_generators(0, 0, 1),
    )
    assert asked == [2666, 1333, 0]
    assert [timesteps.item() for _, timesteps in recorder.seen] == [666.5, 333.25, 0.0]


def test_eta_makes_ddim_stochastic_and_0_does_not():
    unet = random_unet()
    images = [draw(unet, sampler=SamplerConfig(num_inference_steps=5, eta=e)) for e in (0.0, 0.5)]
    assert not torch.allclose(images[0], images[1], atol=1e-2)


def test_fp16_that_overflows_is_an_error_and_no_image():
    unet = random_unet()
    unet.conv_in.weight.data *= 1e5  # the norm behind it makes up for that in float32
    assert torch.isfinite(draw(unet)).all()
    with pytest.raises(
        ConfigError, match="precision must be fp32 or bf16 for this model, got fp1"
    ):
        draw(unet.half(), dtype=torch.float16)


def test_every_step_is_announced():
    steps = []
    sample(
        lambda _: random_unet(),
        make_scheduler(LINEAR, SamplerConfig()),
        spec_of(4),
        image_generators(0, 0, 1),
        on_step=lambda: steps.append(len(steps)),
    )
    assert steps == [0, 1, 2, 3]


def test_pixels_survive_the_way_to_the_model_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert_same(to_uint8(to_minus_one_one(pixels)), pixels.permute(0, 2, 3, 1))


def test_pixels_outside_the_range_are_clipped_and_colours_go_last():
    images = torch.tensor([-3.0, 0.5, 3.0]).reshape(1, 3, 1, 1).expand(2, 3, 4, 5)
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels[0, 0, 0].tolist() == [0, 191, 255]

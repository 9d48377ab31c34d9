from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.errors import ScheduleError

LINEAR = DiffusionConfig()
COSINE = DiffusionConfig(
    num_train_timesteps=4000,
    beta_schedule="squaredcos_cap_v2",
    learned_sigma=True,
    rescale_timesteps=True,
)
TIMESTEPS = torch.tensor([0, 1, 2, 300, 750, 999])


def pixels(*shape, seed=0):
    """Images in [-1, 1] in steps of 2 / 255, black and white among them."""
    values = np.random.default_rng(seed).integers(0, 256, shape)
    values[..., 0], values[..., 1] = 0, 255
    return torch.from_numpy(values / 127.5 - 1).float()


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_betas(config):
    """Betas by hand, in float64."""
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps)
    steps = np.arange(config.num_train_timesteps + 1) / config.num_train_timesteps
    alpha_bar = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


# --- noising ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_noising_mixes_image_and_noise_by_the_share_of_signal_left(config):
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    timesteps = TIMESTEPS * (config.num_train_timesteps // 1000)
    left = np.cumprod(1 - reference_betas(config))[timesteps.numpy()][:, None, None, None]
    expected = np.sqrt(left) * x_0.numpy() + np.sqrt(1 - left) * epsilon.numpy()
    x_t = noise_schedule(config).add_noise(x_0, epsilon, timesteps)
    assert x_t.dtype == torch.float32
    np.testing.assert_allclose(x_t, expected, atol=1e-6)


@given(st.integers(2, 500))
def test_noising_keeps_the_variance(num_timesteps):
    schedule = noise_schedule(DiffusionConfig(num_train_timesteps=num_timesteps))
    assert schedule.num_train_timesteps == num_timesteps
    total = schedule.signal.square() + schedule.noise.square()
    torch.testing.assert_close(total, torch.ones(num_timesteps))


def test_betas_that_are_no_schedule_are_refused():
    with pytest.raises(ScheduleError, match="num_train_timesteps"):
        # The config refuses this too; the schedule does not count on it.
        noise_schedule(
            SimpleNamespace(**vars_of(LINEAR) | {"num_train_timesteps": 1, "is_flow": False})
        )


def vars_of(config):
    return {name: getattr(config, name) for name in config.__slots__}


def test_a_schedule_moves_to_a_device_as_a_whole():
    schedule = noise_schedule(COSINE).to(torch.device("meta"))
    tensors = [v for v in vars_of(schedule).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 7
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert schedule.timestep_scale == 0.25
    assert schedule.learned_sigma


# --- timesteps -------------------------------------------------------------------------------


def test_timesteps_are_scaled_to_a_thousand():
    scaled = noise_schedule(COSINE).model_timesteps(torch.tensor([0, 40, 3960, 3999]))
    assert scaled.tolist() == [0, 10, 990, 999.75]


def test_timesteps_stay_as_they_are_unless_scaling_is_asked_for():
    plain = DiffusionConfig(num_train_timesteps=4000)
    timesteps = torch.tensor([0, 40, 3999])
    assert torch.equal(noise_schedule(plain).model_timesteps(timesteps), timesteps)


def test_batches_split_and_join_with_labels_or_without():
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    for labels in (None, torch.arange(6)):
        batch = NoisedBatch(x_0, epsilon, TIMESTEPS, labels)
        parts = list(batch.split(4))
        assert [len(part.x_0) for part in parts] == [4, 2]
        joined = NoisedBatch.join(parts)
        for name in ("x_0", "epsilon", "timesteps"):
            assert torch.equal(getattr(joined, name), getattr(batch, name))
        assert joined.labels is None if labels is None else torch.equal(joined.labels, labels)


def test_a_perturbation_is_in_the_input_and_not_in_the_target():
    schedule = noise_schedule(DiffusionConfig())
    x_0, epsilon, shift = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    batch = NoisedBatch(x_0, epsilon, TIMESTEPS, perturbation=shift)
    seen = NoisedBatch(x_0, epsilon + shift, TIMESTEPS)
    assert torch.equal(batch.x_t(schedule), seen.x_t(schedule))
    assert torch.equal(batch.target(schedule), epsilon)
    joined = NoisedBatch.join(list(batch.split(4)))
    assert torch.equal(joined.x_t(schedule), seen.x_t(schedule))

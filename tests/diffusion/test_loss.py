from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm
from torch import nn

from tdc_ray.config.diffusion import DiffusionConfig, PredictionType
from tdc_ray.diffusion.loss import Teacher, denoising_loss, loss_per_image, loss_weights
from tdc_ray.diffusion.prediction import PREDICTIONS
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tests.diffusion.test_process import (
    COSINE,
    LINEAR,
    TIMESTEPS,
    gaussian,
    pixels,
    reference_betas,
)

LEARNED = DiffusionConfig(learned_sigma=True)
VELOCITY = DiffusionConfig(prediction_type="v_prediction")
IMAGE = DiffusionConfig(prediction_type="sample")


def reference_vlb_bits(config, epsilon_pred, output, x_0, x_t, timestep):
    """The bound's term of one image at one timestep, in bits per dimension: float64, by the book.

    q(x_{t-1} | x_t, x_0) by Bayes' rule from the product of two Gaussians; p by the network's
    output (arXiv:2102.09672, section 3).
    """
    beta = reference_betas(config)
    alpha_bar = np.cumprod(1 - beta)

    def posterior_variance(t):
        # precision of x_t given x_{t-1}, plus precision of x_{t-1} given x_0
        return 1 / ((1 - beta[t]) / beta[t] + 1 / (1 - alpha_bar[t - 1]))

    def posterior_mean(x_0):
        if timestep == 0:
            return x_0
        towards_x_t = np.sqrt(1 - beta[timestep]) / beta[timestep] * x_t
        before = alpha_bar[timestep - 1]
        towards_x_0 = np.sqrt(before) / (1 - before) * x_0
        return (towards_x_t + towards_x_0) * posterior_variance(timestep)

    low = np.log(posterior_variance(max(timestep, 1)))
    high = np.log(beta[timestep])
    fraction = (output + 1) / 2
    variance = np.exp(fraction * high + (1 - fraction) * low)
    signal, noise = np.sqrt(alpha_bar[timestep]), np.sqrt(1 - alpha_bar[timestep])
    mean = posterior_mean((x_t - noise * epsilon_pred) / signal)
    if timestep == 0:
        deviation = np.sqrt(variance)
        upper = np.where(x_0 > 0.999, 1, norm.cdf(x_0 + 1 / 255, mean, deviation))
        lower = np.where(x_0 < -0.999, 0, norm.cdf(x_0 - 1 / 255, mean, deviation))
        nats = -np.log(np.maximum(upper - lower, 1e-12))
    else:
        true_mean, true_variance = posterior_mean(x_0), np.exp(low)
        nats = (
            np.log(np.sqrt(variance / true_variance))
            + (true_variance + (true_mean - mean) ** 2) / (2 * variance)
            - 0.5
        )
    return nats.mean() / np.log(2)


def losses(config, prediction, x_0, epsilon, timesteps, weights=None):
    batch = NoisedBatch(x_0, epsilon, timesteps)
    return loss_per_image(noise_schedule(config), prediction, batch, weights=weights)


def test_every_prediction_of_the_settings_has_its_row():
    assert set(PREDICTIONS) == set(get_args(PredictionType))


# --- L_simple --------------------------------------------------------------------------------


def test_l_simple_is_the_mean_squared_error_of_epsilon():
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    prediction = gaussian(6, 3, 4, 4, seed=1)
    expected = ((prediction - epsilon).numpy() ** 2).mean(axis=(1, 2, 3))
    found = losses(LINEAR, prediction, x_0, epsilon, TIMESTEPS)
    assert found.shape == (6,)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_target_of_v_prediction_is_diffusers_velocity():
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    velocity = DDPMScheduler().get_velocity(x_0, epsilon, TIMESTEPS)
    assert losses(VELOCITY, velocity, x_0, epsilon, TIMESTEPS).max() < 1e-10
    prediction = gaussian(6, 3, 4, 4, seed=1)
    expected = (prediction - velocity).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(
        losses(VELOCITY, prediction, x_0, epsilon, TIMESTEPS), expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("kind", get_args(PredictionType))
def test_what_a_true_output_implies_is_the_image(kind):
    schedule = noise_schedule(DiffusionConfig(prediction_type=kind))
    prediction = PREDICTIONS[kind]
    x_0, epsilon, rates = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4), schedule.rates(TIMESTEPS)
    output = prediction.target(x_0, epsilon, *rates)
    x_t = schedule.add_noise(x_0, epsilon, TIMESTEPS)
    torch.testing.assert_close(prediction.to_x_0(output, x_t, *rates), x_0, rtol=0, atol=1e-3)


def test_losses_are_float32_whatever_the_network_gives_out():
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    for config, channels in ((LINEAR, 3), (LEARNED, 6)):
        prediction = gaussian(6, channels, 4, 4, seed=1).bfloat16()
        assert losses(config, prediction, x_0, epsilon, TIMESTEPS).dtype == torch.float32


# --- L_hybrid --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LEARNED, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("error", [0.02, 0.3])
def test_l_hybrid_equals_the_reference(config, error):
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    timesteps = TIMESTEPS * (config.num_train_timesteps // 1000)
    epsilon_pred = epsilon + error * gaussian(6, 3, 4, 4, seed=1)
    variance = gaussian(6, 3, 4, 4, seed=2)
    found = losses(config, torch.cat([epsilon_pred, variance], dim=1), x_0, epsilon, timesteps)
    x_t = noise_schedule(config).add_noise(x_0, epsilon, timesteps)
    for index, timestep in enumerate(timesteps.tolist()):
        image = [tensor[index].double().numpy() for tensor in (epsilon_pred, variance, x_0, x_t)]
        bits = reference_vlb_bits(config, *image, timestep)
        simple = ((image[0] - epsilon[index].double().numpy()) ** 2).mean()
        expected = simple + 0.001 * config.num_train_timesteps * bits
        assert found[index].item() == pytest.approx(expected, rel=2e-4, abs=1e-5), timestep


def test_a_weight_of_zero_leaves_l_simple():
    unweighted = DiffusionConfig(learned_sigma=True, vlb_weight=0.0)
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    prediction = gaussian(6, 6, 4, 4, seed=1)
    prediction[:, 3:] *= 1e4  # a variance that was never trained: the bound is infinite
    found = losses(unweighted, prediction, x_0, epsilon, TIMESTEPS)
    torch.testing.assert_close(found, losses(LINEAR, prediction[:, :3], x_0, epsilon, TIMESTEPS))


def test_the_bound_teaches_the_variance_and_leaves_the_mean_alone():
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    prediction = gaussian(6, 6, 4, 4, seed=1).requires_grad_()
    losses(LEARNED, prediction, x_0, epsilon, TIMESTEPS).sum().backward()
    simple = prediction.detach()[:, :3].clone().requires_grad_()
    losses(LINEAR, simple, x_0, epsilon, TIMESTEPS).sum().backward()
    torch.testing.assert_close(prediction.grad[:, :3], simple.grad, rtol=0, atol=0)
    assert (prediction.grad[:, 3:].abs().amax(dim=(1, 2, 3)) > 0).all()


def hybrid_of_a_perfect_mean(variance, timestep):
    """The weighted bound where epsilon is predicted exactly and the variance at ``variance``."""
    x_0, epsilon = pixels(1, 3, 4, 4), gaussian(1, 3, 4, 4)
    prediction = torch.cat([epsilon, torch.full_like(epsilon, variance)], dim=1)
    return losses(LEARNED, prediction, x_0, epsilon, torch.tensor([timestep])).item()


@pytest.mark.parametrize("timestep", [1, 2, 300, 999])
def test_at_minus_one_the_variance_is_the_posteriors(timestep):
    assert hybrid_of_a_perfect_mean(-1.0, timestep) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("timestep", [1, 2, 5, 300])
def test_at_plus_one_the_variance_is_beta(timestep):
    beta = reference_betas(LEARNED)
    before = np.cumprod(1 - beta)
    ratio = (1 - before[timestep - 1]) / (1 - before[timestep])  # posterior variance / beta
    nats = 0.5 * (ratio - 1 - np.log(ratio))  # KL of two Gaussians of equal means
    expected = nats / np.log(2)  # times T = 1000 and the weight 0.001
    assert hybrid_of_a_perfect_mean(1.0, timestep) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_first_timesteps_range_ends_at_the_posterior_variance_of_the_second():
    schedule = noise_schedule(LEARNED)
    assert schedule.min_log_variance[0] == schedule.min_log_variance[1]
    assert schedule.max_log_variance[0].exp().item() == pytest.approx(1e-4)


# --- with a network --------------------------------------------------------------------------


class Scripted(nn.Module):
    """Returns a given output, as a ``UNet2DModel`` would, and keeps its inputs."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, sample, timestep):
        self.sample, self.timestep = sample, timestep
        return SimpleNamespace(sample=self.output)


def test_a_network_that_knows_the_noise_has_no_loss():
    x_0, epsilon = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4)
    model = Scripted(epsilon)
    schedule = noise_schedule(LINEAR)
    batch = NoisedBatch(x_0, epsilon, TIMESTEPS)
    assert denoising_loss(model, schedule, batch).tolist() == [0] * 6
    assert torch.equal(model.sample, schedule.add_noise(x_0, epsilon, TIMESTEPS))


def test_the_network_sees_scaled_timesteps_and_the_noising_does_not():
    x_0, epsilon = pixels(2, 3, 4, 4), gaussian(2, 3, 4, 4)
    model, schedule = Scripted(gaussian(2, 6, 4, 4, seed=1)), noise_schedule(COSINE)
    timesteps = torch.tensor([40, 3960])
    found = denoising_loss(model, schedule, NoisedBatch(x_0, epsilon, timesteps))
    assert model.timestep.tolist() == [10, 990]
    assert torch.equal(model.sample, schedule.add_noise(x_0, epsilon, timesteps))
    torch.testing.assert_close(found, losses(COSINE, model.output, x_0, epsilon, timesteps))


@pytest.mark.parametrize("channels", [3, 6], ids=["mean", "mean and variance"])
def test_a_teacher_pulls_the_gradient_its_share_of_the_way_to_its_own_prediction(channels):
    schedule = noise_schedule(LINEAR)
    batch = NoisedBatch(pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4), TIMESTEPS)
    teacher = Teacher(Scripted(gaussian(6, channels, 4, 4, seed=1)), 0.3)
    output = gaussian(6, 3, 4, 4, seed=2).requires_grad_()
    loss_per_image(schedule, output, batch, teacher=teacher).sum().backward()
    off = 0.7 * (output - batch.epsilon) + 0.3 * (output - teacher.network.output[:, :3])
    torch.testing.assert_close(output.grad, (2 * off / (3 * 4 * 4)).detach())
    assert torch.equal(teacher.network.sample, batch.x_t(schedule))


# --- weights of the timesteps ----------------------------------------------------------------


def snr_at(timestep):
    left = np.cumprod(1 - reference_betas(LINEAR))[timestep]
    return left / (1 - left)


@pytest.mark.parametrize("timestep", [0, 1, 100, 300, 500, 999])
def test_weights_are_those_of_the_papers_at_every_timestep(timestep):
    schedule, snr = noise_schedule(LINEAR), snr_at(timestep)
    expected = {
        ("min-snr", None): min(snr, 5) / snr,
        ("min-snr", 2.0): min(snr, 2) / snr,
        ("p2", None): 1 / (1 + snr),
        ("p2", 0.5): 1 / (1 + snr) ** 0.5,
    }
    for (kind, gamma), weight in expected.items():
        weights = loss_weights(schedule, kind, gamma)
        assert weights.shape == (1000,)
        assert weights[timestep].item() == pytest.approx(weight, rel=1e-5), (kind, gamma)


@pytest.mark.parametrize("kind", ["min-snr", "p2"])
def test_weighted_losses_of_the_same_image_do_not_depend_on_what_is_predicted(kind):
    x_0, epsilon, wrong = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4), gaussian(6, 3, 4, 4, seed=1)
    found = []
    for config in (LINEAR, VELOCITY, IMAGE):
        schedule, rates = noise_schedule(config), noise_schedule(config).rates(TIMESTEPS)
        x_t = schedule.add_noise(x_0, epsilon, TIMESTEPS)
        image = x_0 + 0.1 * wrong  # which both networks imply
        implied = (x_t - rates[0] * image) / rates[1]
        output = schedule.prediction.target(image, implied, *rates)
        weights = loss_weights(schedule, kind, None)
        found.append(losses(config, output, x_0, epsilon, TIMESTEPS, weights))
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-3, atol=1e-9)


def test_min_snr_of_v_prediction_is_that_of_the_paper():
    snr = snr_at(300)
    weights = loss_weights(noise_schedule(VELOCITY), "min-snr", None)
    assert weights[300].item() == pytest.approx(min(snr, 5) / (snr + 1), rel=1e-5)


def test_some_timesteps_are_below_gamma_and_some_are_above():
    weights = loss_weights(noise_schedule(LINEAR), "min-snr", None)
    assert weights[0].item() == pytest.approx(5 / 9999, rel=1e-4)  # betas start at 1e-4
    assert (weights[snr_at(np.arange(1000)) < 5] == 1).all()
    assert 0 < int((weights < 1).sum()) < 999


def test_constant_weights_nothing():
    assert loss_weights(noise_schedule(LINEAR), "constant", None) is None


def test_a_weight_scales_the_loss_of_its_timestep_alone():
    x_0, epsilon, prediction = (gaussian(6, 3, 4, 4, seed=seed) for seed in range(3))
    weights = torch.arange(1000.0)
    plain = losses(LINEAR, prediction, x_0, epsilon, TIMESTEPS)
    weighted = losses(LINEAR, prediction, x_0, epsilon, TIMESTEPS, weights)
    torch.testing.assert_close(weighted, TIMESTEPS * plain)


def test_l_vlb_has_no_weight():
    x_0, epsilon, prediction = pixels(6, 3, 4, 4), gaussian(6, 3, 4, 4), gaussian(6, 6, 4, 4)
    whole = losses(LEARNED, prediction, x_0, epsilon, TIMESTEPS)
    simple = losses(LINEAR, prediction[:, :3], x_0, epsilon, TIMESTEPS)
    vlb = losses(LEARNED, prediction, x_0, epsilon, TIMESTEPS, torch.zeros(1000))
    assert (vlb > 0).all()
    torch.testing.assert_close(vlb + simple, whole)

"""Noising and losses: L_simple, and L_hybrid for networks that learn the variance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.train import LossWeight
from tdc_ray.diffusion.schedule import FloatArray, alphas_cumprod, betas, snr

DEFAULT_GAMMA: Mapping[LossWeight, float] = {"min-snr": 5.0, "p2": 1.0}
"""The papers' own: Min-SNR (arXiv:2303.09556) and P2 (arXiv:2204.00227)."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """What noising and the losses need of every timestep; tensors of shape ``(T,)``, float32."""

    signal: Tensor
    """sqrt(alphas_cumprod)"""

    noise: Tensor
    """sqrt(1 - alphas_cumprod)"""

    snr: Tensor
    """alphas_cumprod / (1 - alphas_cumprod)"""

    posterior_signal: Tensor
    """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM, arXiv:2006.11239, equation 7)."""

    posterior_sample: Tensor
    """Weight of x_t in that mean."""

    min_log_variance: Tensor
    """Log of the posterior's variance, that at t = 0 being set to the one at t = 1."""

    max_log_variance: Tensor
    """log(betas)"""

    timestep_scale: float
    """What a timestep is multiplied with before the network sees it."""

    learned_sigma: bool
    vlb_weight: float

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.signal)

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Move the tensors to a device."""
        return NoiseSchedule(
            self.signal.to(device),
            self.noise.to(device),
            self.snr.to(device),
            self.posterior_signal.to(device),
            self.posterior_sample.to(device),
            self.min_log_variance.to(device),
            self.max_log_variance.to(device),
            self.timestep_scale,
            self.learned_sigma,
            self.vlb_weight,
        )

    def add_noise(self, x_0: Tensor, epsilon: Tensor, timesteps: Tensor) -> Tensor:
        """Draw x_t given x_0 (TDC Eq. 1).

        Args:
            x_0: Images in [-1, 1], ``(B, C, H, W)``.
            epsilon: Standard normal noise, ``(B, C, H, W)``.
            timesteps: ``(B,)``, integers in [0, T).

        Returns:
            ``(B, C, H, W)``.
        """
        return _at(self.signal, timesteps) * x_0 + _at(self.noise, timesteps) * epsilon

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Scale timesteps as the network was taught to see them."""
        return timesteps if self.timestep_scale == 1.0 else timesteps * self.timestep_scale


def noise_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """Compute a schedule in float64 and keep it in float32.

    Raises:
        ScheduleError: The betas are no noise schedule.
    """
    beta = betas(
        config.beta_schedule,
        config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
    )
    alpha_bar = alphas_cumprod(beta)
    before = np.append(1.0, alpha_bar[:-1])
    posterior_variance = beta * (1 - before) / (1 - alpha_bar)
    posterior_variance[0] = posterior_variance[1]
    return NoiseSchedule(
        signal=_tensor(np.sqrt(alpha_bar)),
        noise=_tensor(np.sqrt(1 - alpha_bar)),
        snr=_tensor(snr(alpha_bar)),
        posterior_signal=_tensor(beta * np.sqrt(before) / (1 - alpha_bar)),
        posterior_sample=_tensor((1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar)),
        min_log_variance=_tensor(np.log(posterior_variance)),
        max_log_variance=_tensor(np.log(beta)),
        timestep_scale=config.timestep_scale,
        learned_sigma=config.learned_sigma,
        vlb_weight=config.vlb_weight,
    )


def loss_weights(schedule: NoiseSchedule, kind: LossWeight, gamma: float | None) -> Tensor | None:
    """Weight of every timestep's L_simple, for networks that predict epsilon.

    ``min-snr`` is ``min(snr, gamma) / snr`` (Hang et al., arXiv:2303.09556), ``p2`` is
    ``1 / (k + snr)^gamma`` with the paper's k = 1 (Choi et al., arXiv:2204.00227).

    Args:
        schedule: The noise schedule.
        kind: Which.
        gamma: None: the papers' own.

    Returns:
        ``(T,)``, in (0, 1], float32; None where all weights are 1.
    """
    if kind == "constant":
        return None
    gamma = DEFAULT_GAMMA[kind] if gamma is None else gamma
    if kind == "min-snr":
        return (gamma / schedule.snr).clamp(max=1)
    return (1 + schedule.snr) ** -gamma


def loss_per_image(
    schedule: NoiseSchedule,
    prediction: Tensor,
    *,
    x_0: Tensor,
    x_t: Tensor,
    epsilon: Tensor,
    timesteps: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Training loss of every image: L_simple, or L_hybrid where the variance is learnt.

    L_simple is the mean squared error of epsilon (DDPM, arXiv:2006.11239, equation 14). L_hybrid
    adds ``vlb_weight * L_vlb`` in which the mean is detached (arXiv:2102.09672, equation 16);
    L_vlb is T times the term of the timestep drawn, in bits per dimension.

    Args:
        schedule: The noise schedule, on the device of the tensors.
        prediction: The network's output, ``(B, C, H, W)``, or ``(B, 2C, H, W)`` where the variance
            is learnt: epsilon, then the variance's place in its range.
        x_0: ``(B, C, H, W)``.
        x_t: ``(B, C, H, W)``.
        epsilon: The noise in x_t, ``(B, C, H, W)``.
        timesteps: ``(B,)``.
        weights: Weight of L_simple at every timestep, ``(T,)``; None: 1. L_vlb has none.

    Returns:
        ``(B,)``, float32.
    """
    prediction = prediction.float()
    epsilon_pred, *place = prediction.chunk(2 if schedule.learned_sigma else 1, dim=1)
    simple = (epsilon_pred - epsilon).square().mean(dim=(1, 2, 3))
    if weights is not None:
        simple = weights[timesteps] * simple
    if not place:
        return simple
    mean = epsilon_pred.detach()
    bits = _vlb_bits(schedule, mean, place[0], x_0=x_0, x_t=x_t, timesteps=timesteps)
    return simple + schedule.vlb_weight * schedule.num_train_timesteps * bits


def denoising_loss(
    model: nn.Module,
    schedule: NoiseSchedule,
    x_0: Tensor,
    epsilon: Tensor,
    timesteps: Tensor,
    *,
    class_labels: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Noise images, let the model predict the noise, and give every image's loss.

    Args:
        model: A ``UNet2DModel``.
        schedule: The noise schedule, on the device of the tensors.
        x_0: Images in [-1, 1], ``(B, C, H, W)``.
        epsilon: Standard normal noise, ``(B, C, H, W)``.
        timesteps: ``(B,)``, integers in [0, T).
        class_labels: ``(B,)`` for a model that is conditioned on classes.
        weights: Weight of L_simple at every timestep, ``(T,)``; None: 1.

    Returns:
        ``(B,)``, float32.
    """
    x_t = schedule.add_noise(x_0, epsilon, timesteps)
    told = {} if class_labels is None else {"class_labels": class_labels}
    prediction = model(x_t, schedule.model_timesteps(timesteps), **told).sample
    return loss_per_image(
        schedule,
        prediction,
        x_0=x_0,
        x_t=x_t,
        epsilon=epsilon,
        timesteps=timesteps,
        weights=weights,
    )


def _vlb_bits(
    schedule: NoiseSchedule,
    epsilon_pred: Tensor,
    place: Tensor,
    *,
    x_0: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Term of the variational bound at ``timesteps``, in bits per dimension: ``(B,)``.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) of 8-bit pixels
    at t = 0. The variance is ``exp(v log(beta) + (1 - v) log(posterior variance))`` with
    ``v = (place + 1) / 2`` (arXiv:2102.09672, equation 15).
    """
    x_0_pred = (x_t - _at(schedule.noise, timesteps) * epsilon_pred) / _at(
        schedule.signal, timesteps
    )
    weight_0, weight_t = (
        _at(schedule.posterior_signal, timesteps),
        _at(schedule.posterior_sample, timesteps),
    )
    mean = weight_0 * x_0_pred + weight_t * x_t
    true_mean = weight_0 * x_0 + weight_t * x_t
    low, high = (
        _at(schedule.min_log_variance, timesteps),
        _at(schedule.max_log_variance, timesteps),
    )
    fraction = (place + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    kl = 0.5 * (
        log_variance
        - low
        - 1
        + (low - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    nats = torch.where(
        timesteps[:, None, None, None] == 0, _pixel_nll(x_0, mean, 0.5 * log_variance), kl
    )
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def _pixel_nll(x_0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log likelihood in nats of 8-bit pixels under a Gaussian cut into 255ths.

    DDPM, arXiv:2006.11239, equation 13. ``x_0`` lies in [-1, 1] in steps of 2 / 255.
    """
    inverse = (-log_scale).exp()
    upper = torch.special.ndtr(inverse * (x_0 - mean + 1 / 255))
    lower = torch.special.ndtr(inverse * (x_0 - mean - 1 / 255))
    likelihood = torch.where(
        x_0 < -0.999, upper, torch.where(x_0 > 0.999, 1 - lower, upper - lower)
    )
    return -likelihood.clamp(min=1e-12).log()


def _tensor(values: FloatArray) -> Tensor:
    return torch.from_numpy(values).float()


def _at(values: Tensor, timesteps: Tensor) -> Tensor:
    """Values of the given timesteps, to be broadcast over images: ``(B, 1, 1, 1)``."""
    return values[timesteps][:, None, None, None]

"""Training losses: L_simple, and L_hybrid for networks that learn the variance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdc_ray.config.train import LossWeight
from tdc_ray.diffusion.prediction import weights_of_loss
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule, at
from tdc_ray.models.denoiser import Denoiser

DEFAULT_GAMMA: Mapping[LossWeight, float] = {"min-snr": 5.0, "p2": 1.0}
"""The papers' own: Min-SNR (arXiv:2303.09556) and P2 (arXiv:2204.00227)."""


def loss_weights(schedule: NoiseSchedule, kind: LossWeight, gamma: float | None) -> Tensor | None:
    """Compute the weight of every timestep's L_simple.

    ``min-snr`` is that of Hang et al. (arXiv:2303.09556), ``p2`` that of Choi et al.
    (arXiv:2204.00227) with the paper's k = 1.

    Args:
        schedule: The noise schedule.
        kind: How timesteps are weighted.
        gamma: None means the papers' own.

    Returns:
        ``(T,)``, positive, float32; None where all weights are 1.
    """
    if kind == "constant":
        return None
    gamma = DEFAULT_GAMMA[kind] if gamma is None else gamma
    return weights_of_loss(schedule.prediction, kind, schedule.snr, gamma)


@dataclass(frozen=True, slots=True)
class Teacher:
    """A network whose predictions another learns from."""

    network: Denoiser
    """In eval mode, on the device of the batches."""

    share: float
    """Of its prediction in the target, in [0, 1]."""

    def target(self, schedule: NoiseSchedule, batch: NoisedBatch) -> Tensor:
        """Interpolate between what is true and what the network predicts: ``(B, C, H, W)``.

        The mean squared error from it has the gradient of ``1 - share`` times that from the truth
        plus ``share`` times that from the prediction.
        """
        true = batch.target(schedule)
        with torch.no_grad():
            predicted = batch.predict(self.network, schedule).float()[:, : true.shape[1]]
        return true.lerp(predicted, self.share)


def loss_per_image(
    schedule: NoiseSchedule,
    output: Tensor,
    batch: NoisedBatch,
    *,
    weights: Tensor | None = None,
    teacher: Teacher | None = None,
) -> Tensor:
    """Compute every image's training loss: L_simple, or L_hybrid where the variance is learnt.

    L_simple is the mean squared error of the prediction (DDPM, arXiv:2006.11239, equation 14).
    L_hybrid adds ``vlb_weight * L_vlb`` in which the mean is detached (arXiv:2102.09672, equation
    16); L_vlb is T times the term of the timestep drawn, in bits per dimension.

    Args:
        schedule: The noise schedule, on the device of the tensors.
        output: The network's, ``(B, C, H, W)``, or ``(B, 2C, H, W)`` where the variance is
            learnt: the prediction, then where in its range the variance lies, from -1 to 1.
        batch: What the network saw.
        weights: Weight of L_simple at every timestep, ``(T,)``; None means 1. L_vlb has none.
        teacher: Whose predictions are part of L_simple's target; None means nobody's.

    Returns:
        ``(B,)``, float32.
    """
    predicted, *variance = output.float().chunk(2 if schedule.learned_sigma else 1, dim=1)
    target = batch.target(schedule) if teacher is None else teacher.target(schedule, batch)
    simple = (predicted - target).square().mean(dim=(1, 2, 3))
    if weights is not None:
        simple = weights[batch.timesteps] * simple
    if not variance or not schedule.vlb_weight:
        return simple
    bits = _vlb_bits(schedule, predicted.detach(), (variance[0] + 1) / 2, batch)
    return simple + schedule.vlb_weight * schedule.num_train_timesteps * bits


def denoising_loss(
    model: nn.Module,
    schedule: NoiseSchedule,
    batch: NoisedBatch,
    *,
    weights: Tensor | None = None,
    teacher: Teacher | None = None,
) -> Tensor:
    """Run a model on noised images, and compute every image's training loss.

    Args:
        model: A ``UNet2DModel``.
        schedule: The noise schedule, on the device of the model.
        batch: Images, noise, timesteps and labels, on that device, too.
        weights: Weight of L_simple at every timestep, ``(T,)``; None means 1.
        teacher: Whose predictions are part of the target; None means nobody's.

    Returns:
        ``(B,)``, float32.
    """
    output = batch.predict(model, schedule)
    return loss_per_image(schedule, output, batch, weights=weights, teacher=teacher)


def _vlb_bits(
    schedule: NoiseSchedule, predicted: Tensor, variance_fraction: Tensor, batch: NoisedBatch
) -> Tensor:
    """Compute the variational bound's term at the batch's timesteps, in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) of 8-bit pixels
    at t = 0. The variance is ``exp(v log(beta) + (1 - v) log(posterior variance))`` where v is
    ``variance_fraction`` (arXiv:2102.09672, equation 15).

    Returns:
        ``(B,)``.
    """
    timesteps, x_t = batch.timesteps, batch.x_t(schedule)
    x_0_pred = schedule.prediction.to_x_0(predicted, x_t, *schedule.rates(timesteps))
    of_x_0, of_x_t = (
        at(weight, timesteps) for weight in (schedule.posterior_signal, schedule.posterior_sample)
    )
    mean, true_mean = of_x_0 * x_0_pred + of_x_t * x_t, of_x_0 * batch.x_0 + of_x_t * x_t
    low, high = at(schedule.min_log_variance, timesteps), at(schedule.max_log_variance, timesteps)
    log_variance = variance_fraction * high + (1 - variance_fraction) * low
    kl = 0.5 * (
        log_variance
        - low
        - 1
        + (low - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    at_0 = timesteps[:, None, None, None] == 0
    nats = torch.where(at_0, _pixel_nll(batch.x_0, mean, 0.5 * log_variance), kl)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def _pixel_nll(x_0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Compute the negative log likelihood of 8-bit pixels under a discretized Gaussian, in nats.

    DDPM, arXiv:2006.11239, equation 13. ``x_0`` lies in [-1, 1] in steps of 2 / 255.
    """
    inverse = (-log_scale).exp()
    upper = torch.special.ndtr(inverse * (x_0 - mean + 1 / 255))
    lower = torch.special.ndtr(inverse * (x_0 - mean - 1 / 255))
    likelihood = torch.where(
        x_0 < -0.999, upper, torch.where(x_0 > 0.999, 1 - lower, upper - lower)
    )
    return -likelihood.clamp(min=1e-12).log()

"""The noise process as tensors: noising, and the batch that losses are computed on."""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.prediction import Prediction, prediction_of
from tdc_ray.diffusion.schedule import FloatArray, NoiseProcess
from tdc_ray.models.denoiser import DenoiserOutput
from tdc_ray.models.labels import Labels, conditions, join_labels, map_labels


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """What noising and the losses need of every timestep; tensors of shape ``(T,)``, float32."""

    signal: Tensor
    """The signal's rate: sqrt(alphas_cumprod), 1 - s of rectified flow, or EDM's c_in."""

    noise: Tensor
    """The noise's rate: sqrt(1 - alphas_cumprod), s, or sigma times c_in."""

    snr: Tensor
    """(signal / noise)^2"""

    posterior_signal: Tensor
    """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM, arXiv:2006.11239, equation 7).

    This and the next three are empty without betas, where no variance is learned."""

    posterior_sample: Tensor
    """Weight of x_t in that mean."""

    min_log_variance: Tensor
    """Log of the posterior's variance, that at t = 0 being set to the one at t = 1."""

    max_log_variance: Tensor
    """log(betas)"""

    timestep_scale: float
    """What a timestep is multiplied with before the network sees it."""

    conditioning: Tensor | None
    """What the network sees in place of a timestep: EDM's c_noise; None means nothing else."""

    training_cdf: Tensor | None
    """With what probability training draws a timestep below each, ``(T + 1,)``, float64; None
    means that all are equally likely."""

    learned_sigma: bool
    vlb_weight: float
    prediction: Prediction
    """What the network's output estimates."""

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T."""
        return len(self.signal)

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Copy the tensors to a device."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
        return NoiseSchedule(**(values | moved))

    def rates(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signal's and the noise's rates at timesteps ``(B,)``: ``(B, 1, 1, 1)``."""
        return at(self.signal, timesteps), at(self.noise, timesteps)

    def add_noise(self, x_0: Tensor, epsilon: Tensor, timesteps: Tensor) -> Tensor:
        """Draw x_t given x_0 (TDC Eq. 1).

        Args:
            x_0: Images in [-1, 1], ``(B, C, H, W)``.
            epsilon: Standard normal noise, ``(B, C, H, W)``.
            timesteps: ``(B,)``, integers in [0, T).

        Returns:
            ``(B, C, H, W)``.
        """
        signal, noise = self.rates(timesteps)
        return signal * x_0 + noise * epsilon

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return timesteps as the network was taught to see them."""
        if self.conditioning is not None:
            return self.conditioning[timesteps]
        return timesteps if self.timestep_scale == 1.0 else timesteps * self.timestep_scale

    def draw_timesteps(self, count: int, timesteps: range, generator: torch.Generator) -> Tensor:
        """Draw timesteps to train on, ``(count,)``, on the device of the generator.

        Args:
            count: How many.
            timesteps: The contiguous timesteps to draw from.
            generator: Where all that is random comes from.
        """
        device = generator.device
        if self.training_cdf is None:
            return torch.randint(
                timesteps.start, timesteps.stop, (count,), generator=generator, device=device
            )
        low, high = self.training_cdf[timesteps.start], self.training_cdf[timesteps.stop]
        share = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        below = torch.searchsorted(self.training_cdf, low + share * (high - low), right=True)
        return (below - 1).clamp(timesteps.start, timesteps.stop - 1)


def noise_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """Compute a schedule in float64 and keep it in float32.

    Raises:
        ScheduleError: The betas are no noise schedule.
    """
    process = NoiseProcess.of(config)
    beta, alpha_bar = process.betas, process.alphas_cumprod
    if beta is None:
        beta = alpha_bar = np.ones(0)
    before = np.append(1.0, alpha_bar)[:-1]
    posterior_variance = beta * (1 - before) / (1 - alpha_bar)
    posterior_variance[:1] = posterior_variance[1:2]
    return NoiseSchedule(
        signal=_tensor(process.signal),
        noise=_tensor(process.noise),
        snr=_tensor(process.snr),
        posterior_signal=_tensor(beta * np.sqrt(before) / (1 - alpha_bar)),
        posterior_sample=_tensor((1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar)),
        min_log_variance=_tensor(np.log(posterior_variance)),
        max_log_variance=_tensor(np.log(beta)),
        timestep_scale=config.timestep_scale,
        conditioning=None if process.conditioning is None else _tensor(process.conditioning),
        training_cdf=_training_cdf(config, process),
        learned_sigma=config.learned_sigma,
        vlb_weight=config.vlb_weight,
        prediction=prediction_of(config),
    )


def _training_cdf(config: DiffusionConfig, process: NoiseProcess) -> Tensor | None:
    if config.p_std is None:
        return None
    return torch.from_numpy(process.log_normal_cdf(config.p_mean, config.p_std))


@dataclass(frozen=True, slots=True)
class NoisedBatch:
    """Images, and the noise and timesteps by which a network sees them."""

    x_0: Tensor
    """In [-1, 1], ``(B, C, H, W)``."""

    epsilon: Tensor
    """Standard normal, ``(B, C, H, W)``."""

    timesteps: Tensor
    """Integers in [0, T), ``(B,)``."""

    labels: Labels = None
    """Classes, ``(B,)``, or captions; None for networks that are conditioned on neither."""

    perturbation: Tensor | None = None
    """Added to the noise that the network sees, and not to its target (arXiv:2301.11706),
    ``(B, C, H, W)``; None means nothing."""

    def split(self, size: int) -> Iterator["NoisedBatch"]:
        """Split into batches of at most so many images."""
        for start in range(0, len(self.x_0), size):
            yield self._map(operator.itemgetter(slice(start, start + size)))

    def to(self, device: torch.device) -> "NoisedBatch":
        """Copy the tensors to a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "NoisedBatch":
        """Apply a function to each of the tensors."""
        perturbation = self.perturbation
        return NoisedBatch(
            function(self.x_0),
            function(self.epsilon),
            function(self.timesteps),
            map_labels(function, self.labels),
            None if perturbation is None else function(perturbation),
        )

    @staticmethod
    def join(batches: Sequence["NoisedBatch"]) -> "NoisedBatch":
        """Concatenate batches; labels and perturbations have all of them, or none has."""
        return NoisedBatch(
            torch.cat([batch.x_0 for batch in batches]),
            torch.cat([batch.epsilon for batch in batches]),
            torch.cat([batch.timesteps for batch in batches]),
            join_labels([batch.labels for batch in batches]),
            _join([batch.perturbation for batch in batches]),
        )

    def x_t(self, schedule: NoiseSchedule) -> Tensor:
        """Add the noise: ``(B, C, H, W)``."""
        noise = self.epsilon
        if self.perturbation is not None:
            noise = noise + self.perturbation
        return schedule.add_noise(self.x_0, noise, self.timesteps)

    def target(self, schedule: NoiseSchedule) -> Tensor:
        """Compute what a network's output is compared with: ``(B, C, H, W)``."""
        rates = schedule.rates(self.timesteps)
        return schedule.prediction.target(self.x_0, self.epsilon, *rates)

    def predict(self, model: Callable[..., DenoiserOutput], schedule: NoiseSchedule) -> Tensor:
        """Compute the output of a ``Denoiser``, ``(B, C or 2C, H, W)``."""
        timesteps = schedule.model_timesteps(self.timesteps)
        named = conditions(self.labels)
        output: Tensor = model(self.x_t(schedule), timestep=timesteps, **named).sample
        return output


def at(values: Tensor, timesteps: Tensor) -> Tensor:
    """Return the values ``(T,)`` of timesteps ``(B,)``, to broadcast: ``(B, 1, 1, 1)``."""
    return values[timesteps][:, None, None, None]


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


def _tensor(values: FloatArray) -> Tensor:
    return torch.from_numpy(values).float()

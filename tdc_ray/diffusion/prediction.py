"""What a network's output estimates: one row for each kind.

All that the losses need to know of it is here; diffusers' schedulers convert by themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tdc_ray.config.diffusion import DiffusionConfig, PredictionType
from tdc_ray.config.train import LossWeight


class Prediction(Protocol):
    """What a network was taught to output for ``x_t = signal * x_0 + noise * epsilon``.

    ``signal`` and ``noise`` are the rates of the timesteps, ``(B, 1, 1, 1)``; images, noise and
    outputs are ``(B, C, H, W)``.
    """

    def target(self, x_0: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Compute what the output is compared with."""
        ...

    def to_x_0(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Convert an output to the x_0 that it implies."""
        ...

    def per_epsilon(self, snr: Tensor) -> Tensor:
        """Compute by what the output's squared error is to be multiplied for that of epsilon."""
        ...


class Epsilon:
    """The noise (DDPM, arXiv:2006.11239, equation 14)."""

    def target(self, x_0: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Return the noise."""
        return epsilon

    def to_x_0(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Compute x_0 from x_t and the noise."""
        return (x_t - noise * output) / signal

    def per_epsilon(self, snr: Tensor) -> Tensor:
        """Return ones."""
        return snr.new_ones(snr.shape)


class Velocity:
    """The velocity ``signal * epsilon - noise * x_0`` (arXiv:2202.00512, appendix D).

    The squares of the rates add up to 1.
    """

    def target(self, x_0: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Compute the velocity."""
        return signal * epsilon - noise * x_0

    def to_x_0(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Compute x_0 from x_t and the velocity."""
        return signal * x_t - noise * output

    def per_epsilon(self, snr: Tensor) -> Tensor:
        """Compute ``signal^2``: an error of epsilon is ``signal`` times that of the velocity."""
        return snr / (1 + snr)


class Sample:
    """The image, x_0."""

    def target(self, x_0: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Return the image."""
        return x_0

    def to_x_0(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Return the output."""
        return output

    def per_epsilon(self, snr: Tensor) -> Tensor:
        """Return the SNR: an error of epsilon is ``signal / noise`` times that of x_0."""
        return snr


class Flow:
    """Rectified flow's velocity ``epsilon - x_0`` (arXiv:2209.03003); the rates add up to 1."""

    def target(self, x_0: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Compute the velocity."""
        return epsilon - x_0

    def to_x_0(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Compute x_0 from x_t and the velocity."""
        return x_t - noise * output

    def per_epsilon(self, snr: Tensor) -> Tensor:
        """Compute ``signal^2``: an error of epsilon is ``signal`` times that of the velocity."""
        return snr / (1 + snr.sqrt()).square()


@dataclass(frozen=True, slots=True)
class Preconditioned:
    """What is left to EDM's network F (arXiv:2206.00364, equation 8), or its negative.

    The denoised image is ``c_skip * x + c_out * F``. The mean squared error of F is that of the
    image times EDM's weight, 1 / c_out^2.
    """

    sigma_data: float
    sign: int
    """1, or -1 for the negative: the velocity, for data of standard deviation 1."""

    def target(self, x_0: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Compute ``(x_0 - c_skip * x) / c_out``."""
        return self.sign * (noise / self.sigma_data * x_0 - self.sigma_data * signal * epsilon)

    def to_x_0(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Compute the denoised image; ``x_t`` is ``signal * x``."""
        skipped = self.sigma_data**2 * signal * x_t
        return skipped + self.sign * self.sigma_data * noise * output

    def per_epsilon(self, snr: Tensor) -> Tensor:
        """Compute ``(sigma_data * signal)^2``: F has the noise times that root."""
        of_data = self.sigma_data**2 * snr
        return of_data / (1 + of_data)


PREDICTIONS: Mapping[PredictionType, Prediction] = {
    "epsilon": Epsilon(),
    "v_prediction": Velocity(),
    "sample": Sample(),
    "flow_prediction": Flow(),
}
"""By ``diffusion.prediction_type``, for networks without EDM's preconditioning."""


def prediction_of(diffusion: DiffusionConfig) -> Prediction:
    """Return what a network of these settings predicts."""
    if diffusion.sigma_data is not None:
        return Preconditioned(
            diffusion.sigma_data, 1 if diffusion.prediction_type == "epsilon" else -1
        )
    return PREDICTIONS[diffusion.prediction_type]


def weights_of_loss(prediction: Prediction, kind: LossWeight, snr: Tensor, gamma: float) -> Tensor:
    """Compute the weight of every timestep's squared error of the output.

    An error of epsilon counts ``min(snr, gamma) / snr`` (min-snr), or ``1 / (1 + snr)^gamma``
    (p2), whatever the network outputs.

    Args:
        prediction: What the output is.
        kind: min-snr or p2.
        snr: Of every timestep, ``(T,)``.
        gamma: The weight's parameter.

    Returns:
        ``(T,)``.
    """
    of_epsilon = (gamma / snr).clamp(max=1) if kind == "min-snr" else (1 + snr) ** -gamma
    return of_epsilon * prediction.per_epsilon(snr)

"""What a network's output estimates: one row for each kind, epsilon alone for now.

All that the losses need to know of it is here; diffusers' schedulers convert by themselves.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from tdc_ray.config.diffusion import PredictionType
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

    def weights(self, kind: LossWeight, snr: Tensor, gamma: float) -> Tensor:
        """Compute the weight of every timestep's squared error, ``(T,)``, from its ``snr``."""
        ...


class Epsilon:
    """The noise (DDPM, arXiv:2006.11239, equation 14)."""

    def target(self, x_0: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002
        """Return the noise."""
        return epsilon

    def to_x_0(self, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """Compute x_0 from x_t and the noise."""
        return (x_t - noise * output) / signal

    def weights(self, kind: LossWeight, snr: Tensor, gamma: float) -> Tensor:
        """Compute ``min(snr, gamma) / snr`` (min-snr) or ``1 / (1 + snr)^gamma`` (p2)."""
        if kind == "min-snr":
            return (gamma / snr).clamp(max=1)
        return (1 + snr) ** -gamma


PREDICTIONS: Mapping[PredictionType, Prediction] = {"epsilon": Epsilon()}

"""The noise process in float64 NumPy: betas, alphas_cumprod and the signal-to-noise ratio."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from tdc_ray.config.diffusion import BetaSchedule, DiffusionConfig
from tdc_ray.errors import ScheduleError

FloatArray = NDArray[np.float64]

MAX_BETA = 0.999
"""Largest beta of the cosine schedule (Nichol and Dhariwal, arXiv:2102.09672, section 3.2)."""

KARRAS_RHO = 7.0
"""EDM's, and diffusers'."""

COSINE_OFFSET = 0.008
"""The small offset s of the cosine schedule (arXiv:2102.09672, equation 17)."""


@dataclass(frozen=True, eq=False, slots=True)
class NoiseProcess:
    """How noise is added to images, which plan, samplers and losses read: arrays ``(T,)``."""

    betas: FloatArray | None
    """Variance of the noise that each timestep adds, unitless, inside (0, 1) (1 at the end); None
    for rectified flow and EDM."""

    alphas_cumprod: FloatArray
    """Share of an image's variance that is left at each timestep (DDPM's alpha-bar), unitless,
    strictly decreasing inside (0, 1); the last may be 0."""

    snr: FloatArray
    """Signal-to-noise ratio, alphas_cumprod / (1 - alphas_cumprod): a ratio of variances."""

    signal: FloatArray
    """What images are multiplied with."""

    noise: FloatArray
    """What standard normal noise is multiplied with before it is added."""

    conditioning: FloatArray | None = None
    """What the network sees of a timestep, rising; None means the timestep itself."""

    @classmethod
    def of(cls, config: DiffusionConfig) -> "NoiseProcess":
        """Compute the noise process of the settings.

        Raises:
            ScheduleError: The betas are no noise schedule.
        """
        if config.is_flow:
            return cls.flow(config.num_train_timesteps)
        if config.sigma_data is not None:
            return cls.edm(
                config.num_train_timesteps, config.sigma_data, config.sigma_min, config.sigma_max
            )
        values = betas_of(config)
        return cls.from_betas(zero_terminal(values) if config.rescale_betas_zero_snr else values)

    @classmethod
    def from_betas(cls, betas: FloatArray) -> "NoiseProcess":
        """Compute the noise process of any betas, ``(T,)``.

        Raises:
            ScheduleError: The signal is used up, or does not decrease with every timestep.
        """
        alphas_cumprod = np.asarray(np.cumprod(1.0 - betas), dtype=np.float64)
        ratio = snr(alphas_cumprod)
        return cls(
            betas, alphas_cumprod, ratio, np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
        )

    @classmethod
    def flow(cls, num_train_timesteps: int) -> "NoiseProcess":
        """Compute the process of rectified flow (arXiv:2209.03003).

        At the timesteps t = 0 to T the noise's rate is s = t / T and the signal's 1 - s. The first
        of diffusers is 1; 0 serves what samplers visit below a half, and is learnt at a quarter.

        Args:
            num_train_timesteps: T.
        """
        s = np.maximum(np.arange(num_train_timesteps + 1), 0.25) / num_train_timesteps
        ratio = ((1 - s) / s) ** 2
        return cls(None, ratio / (1 + ratio), ratio, 1 - s, s)

    @classmethod
    def edm(
        cls, num_train_timesteps: int, sigma_data: float, sigma_min: float, sigma_max: float
    ) -> "NoiseProcess":
        """Compute EDM's process, as its networks see it (arXiv:2206.00364, table 1).

        Their input is c_in (x_0 + sigma epsilon) with c_in = 1 / sqrt(sigma^2 + sigma_data^2),
        their conditioning c_noise = ln(sigma) / 4. SNR is that of images as they are, sigma^-2.

        Args:
            num_train_timesteps: T, at least 2: how many sigmas, spaced as its equation 5.
            sigma_data: Standard deviation of the images.
            sigma_min: The first sigma.
            sigma_max: The last.
        """
        low, high = (sigma ** (1 / KARRAS_RHO) for sigma in (sigma_min, sigma_max))
        sigmas = np.linspace(low, high, num_train_timesteps) ** KARRAS_RHO
        c_in, ratio = 1 / np.sqrt(sigmas**2 + sigma_data**2), sigmas**-2
        return cls(None, ratio / (1 + ratio), ratio, c_in, sigmas * c_in, np.log(sigmas) / 4)

    def log_normal_cdf(self, mean: float, std: float) -> FloatArray:
        """Compute with what probability a log-normal sigma is nearest to a timestep below another.

        Args:
            mean: Of ln(sigma), for EDM's process.
            std: Its standard deviation.

        Returns:
            ``(T + 1,)``, rising from 0 to 1: of the timesteps below 0, 1, ..., T.
        """
        assert self.conditioning is not None
        log_sigma = 4 * self.conditioning
        between = (log_sigma[1:] + log_sigma[:-1]) / 2
        normal = NormalDist(mean, std)
        return np.array([0.0, *map(normal.cdf, between.tolist()), 1.0])

    @property
    def snr_db(self) -> FloatArray:
        """Signal-to-noise ratio of every timestep, in dB, strictly decreasing and finite.

        A last timestep without signal counts as far below the one before as that is below its own:
        plans stay finite, and so does their JSON. TDC (arXiv:2312.13307) Eq. 2::

            SNR(t) = 10 log10(alphas_cumprod[t] / (1 - alphas_cumprod[t]))
        """
        ratios = self.snr if self.has_signal else self.snr[:-1]
        decibels = 10.0 * np.log10(ratios)
        if not self.has_signal:
            below = 2 * decibels[-1] - decibels[-2] if len(decibels) > 1 else decibels[-1] - 10
            decibels = np.append(decibels, below)
        return np.asarray(decibels)

    @property
    def has_signal(self) -> bool:
        """Whether something of the image is left at the last timestep."""
        return bool(self.snr[-1] > 0)


def betas(
    schedule: BetaSchedule, num_train_timesteps: int, *, beta_start: float, beta_end: float
) -> FloatArray:
    """Compute the variance of the noise that each timestep adds.

    The names are those of diffusers: ``linear`` (DDPM, arXiv:2006.11239), ``scaled_linear``
    (linear in the square root; latent diffusion, arXiv:2112.10752) and ``squaredcos_cap_v2``
    (cosine, arXiv:2102.09672 equation 17, which needs no ``beta_start`` and ``beta_end``).

    Returns:
        Shape ``(T,)``, unitless, inside (0, 1).

    Raises:
        ScheduleError: ``num_train_timesteps`` is below 2, or a beta lies outside (0, 1).
    """
    if num_train_timesteps < 2:
        raise ScheduleError(f"num_train_timesteps must be at least 2, got {num_train_timesteps}.")
    if schedule == "linear":
        values = np.linspace(beta_start, beta_end, num_train_timesteps)
    elif schedule == "scaled_linear":
        values = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    else:
        time = np.arange(num_train_timesteps + 1) / num_train_timesteps
        alpha_bar = np.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
        values = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], MAX_BETA)
    if not np.all((values > 0) & (values < 1)):
        raise ScheduleError(f"betas must lie inside (0, 1), got [{values.min()}, {values.max()}].")
    return np.asarray(values, dtype=np.float64)


def betas_of(config: DiffusionConfig) -> FloatArray:
    """Compute the betas of the settings' schedule, ``(T,)``, before they are rescaled.

    Raises:
        ScheduleError: They are no noise schedule.
    """
    return betas(
        config.beta_schedule,
        config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
    )


def zero_terminal(betas: FloatArray) -> FloatArray:
    """Rescale betas so that no signal is left at the last timestep.

    arXiv:2305.08891, algorithm 1: the root of alphas_cumprod is shifted to end at 0, and scaled to
    begin where it began.

    Args:
        betas: Shape ``(T,)``, inside (0, 1).

    Returns:
        Shape ``(T,)``; the last is 1.
    """
    roots = np.sqrt(np.cumprod(1.0 - betas))
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    alphas_cumprod = roots**2
    return np.asarray(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))


def snr(alphas_cumprod: FloatArray) -> FloatArray:
    """Compute the signal-to-noise ratio: ``alphas_cumprod / (1 - alphas_cumprod)``.

    Args:
        alphas_cumprod: Shape ``(T,)``, unitless, strictly decreasing inside (0, 1), or 0 for the
            last.

    Returns:
        Shape ``(T,)``, a ratio of variances, strictly decreasing.

    Raises:
        ScheduleError: A value is outside (0, 1), or the values do not decrease.
    """
    if not (np.all((alphas_cumprod >= 0) & (alphas_cumprod < 1)) and np.all(alphas_cumprod[:-1])):
        low, high = alphas_cumprod.min(), alphas_cumprod.max()
        raise ScheduleError(
            f"alphas_cumprod must lie inside (0, 1), the last may be 0, got [{low}, {high}]."
        )
    if not np.all(np.diff(alphas_cumprod) < 0):
        raise ScheduleError("alphas_cumprod must strictly decrease with the timestep.")
    return np.asarray(alphas_cumprod / (1.0 - alphas_cumprod))


def nearest_timestep(timestep: float) -> int:
    """Return the timestep of training that is nearest to one that a sampler visits.

    Of two that are equally near it is the noisier one.
    """
    return math.floor(timestep + 0.5)


def nearest_timesteps(timesteps: Sequence[float]) -> list[int]:
    """Return the timestep of training that is nearest to each."""
    return [nearest_timestep(timestep) for timestep in timesteps]


def as_seen(
    diffusion: DiffusionConfig, spans: Sequence[tuple[int, int]]
) -> Sequence[tuple[float, float]]:
    """Return first and last timesteps of training as schedulers and networks see them."""
    seen = NoiseProcess.of(diffusion).conditioning if diffusion.is_edm else None
    if seen is None:
        return spans
    return [(float(seen[first]), float(seen[last])) for first, last in spans]


def recognise(values: FloatArray) -> tuple[BetaSchedule, float, float] | None:
    """Find the schedule that betas are of.

    Args:
        values: Shape ``(T,)``; computed in float32 or better.

    Returns:
        Its name, ``beta_start`` and ``beta_end`` (which the cosine schedule does not need); None
        where no schedule known here has these betas.
    """
    if len(values) < 2 or not np.all((values > 0) & (values < 1)):
        return None
    start, end = (float(f"{value:.6g}") for value in (values[0], values[-1]))
    for schedule in get_args(BetaSchedule):
        known = betas(schedule, len(values), beta_start=start, beta_end=end)
        if np.allclose(values, known, rtol=1e-5, atol=1e-8):
            return schedule, start, end
    return None

"""Frechet distances between sets of features."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cleanfid.fid import frechet_distance

from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.storage.files import atomic_path, fetch


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over features, from which mean and covariance follow; shards of them add up."""

    count: int
    total: FloatArray
    """``(D,)``"""

    outer: FloatArray
    """``(D, D)``"""

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.total + other.total, self.outer + other.outer
        )

    def mean_and_covariance(self) -> tuple[FloatArray, FloatArray]:
        """Return the mean ``(D,)`` and the unbiased covariance ``(D, D)``."""
        mean = self.total / self.count
        covariance = (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return mean, covariance

    def save(self, path: Path) -> None:
        """Write an npz file, atomically."""
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, count=self.count, total=self.total, outer=self.outer)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Load what :meth:`save` wrote."""
        with np.load(fetch(path), allow_pickle=False) as file:
            return cls(int(file["count"]), file["total"], file["outer"])


def moments_of(features: FloatArray) -> Moments:
    """Compute the moments of features ``(N, D)``."""
    return Moments(len(features), features.sum(0), features.T @ features)


def distance(one: tuple[FloatArray, FloatArray], other: tuple[FloatArray, FloatArray]) -> float:
    """Compute the Frechet distance between Gaussians of mean ``(D,)``, covariance ``(D, D)``."""
    return float(frechet_distance(*one, *other))

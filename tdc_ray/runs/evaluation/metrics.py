"""Distances between sets of features: Frechet's by clean-fid, the others by torch-fidelity.

Features are those that a run has anyway, so a library must take them as they are. clean-fid's
Frechet distance needs their moments alone, and its resizing is what FIDs are compared by. But its
kernel distance draws from NumPy's global generator, and it has no precision; torchmetrics takes
images in place of features, and has no precision either; prdc holds the distances of all pairs at
once. torch-fidelity's functions take features, draw by a seed, and take pairs in parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cleanfid.fid import frechet_distance
from numpy.typing import NDArray

from tdc_ray.config.evaluate import Metric
from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.storage.files import atomic_path, fetch

MAX_FEATURES = 10_000
"""Most images of a set whose features are kept, for all but the Frechet distance."""

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the kernel distance, as everywhere."""

NEIGHBOURS = 3
"""Of precision and recall, as in their paper."""

PAIRS = 1000
"""Images of one side whose distances to the other side are held at once."""


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


def drawn(count: int) -> NDArray[np.int64]:
    """Return which of so many images' features are kept, in order: all, or a random choice."""
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[:MAX_FEATURES])


def metrics_text(num_images: int) -> str:
    """Write how the metrics beside the Frechet distance are computed."""
    count = min(num_images, MAX_FEATURES)
    return (
        f"{count} images; kernel distances of {SUBSETS} subsets of at most {SUBSET_SIZE}, "
        f"precision and recall by {NEIGHBOURS} nearest neighbours (torch-fidelity)"
    )


def other_metrics(
    samples: NDArray[np.float32], reference: NDArray[np.float32], metrics: Sequence[Metric]
) -> dict[str, float]:
    """Compute what is asked for beside the Frechet distance.

    Args:
        samples: Features of the samples, ``(N, D)``.
        reference: Features of the training images, ``(M, D)``.
        metrics: What is asked for.

    Returns:
        ``kd``, ``precision`` and ``recall`` as far as they are; none of them of fewer images
        than have :data:`NEIGHBOURS` neighbours.
    """
    fewest, found = min(len(samples), len(reference)), dict[str, float]()
    if not metrics or fewest <= NEIGHBOURS:
        return found
    import torch
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    one, other = torch.from_numpy(samples), torch.from_numpy(reference)
    if "kid" in metrics:
        sizes = {"kid_subsets": SUBSETS, "kid_subset_size": min(SUBSET_SIZE, fewest)}
        values = kid_features_to_metric(one.double(), other.double(), verbose=False, **sizes)
        found["kd"] = float(values[KEY_METRIC_KID_MEAN])
    if "precision-recall" in metrics:
        values = prc_features_to_metric(
            one,
            other,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=PAIRS,
            save_cpu_ram=True,
            verbose=False,
        )
        found |= {name: float(values[name]) for name in ("precision", "recall")}
    return found

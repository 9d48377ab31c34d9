"""Labels of an npz file, or given in Python, in any of their usual forms, as whole numbers."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tdc_ray.data.sources.encoded import MOST_CLASSES
from tdc_ray.errors import DataError


def check_type(dtype: np.dtype, source: Path | str) -> None:
    """Refuse labels that are no numbers, before they are read.

    Raises:
        DataError: They are text, Python objects, or the like.
    """
    if dtype.kind not in "buif":
        kind = "text" if dtype.kind in "US" else str(dtype)
        raise DataError(
            f"labels in {source} must be whole numbers, got {kind}. Number the classes: names, "
            "labels = numpy.unique(labels, return_inverse=True)."
        )


def class_numbers(
    labels: NDArray[np.generic], count: int, source: Path | str
) -> NDArray[np.int64]:
    """Convert labels into class numbers.

    Args:
        labels: ``(N,)`` or ``(N, 1)`` whole numbers, of any type, or ``(N, K)`` one-hot.
        count: ``N``, the number of images.
        source: What they are of, for the error.

    Returns:
        ``(N,)``.

    Raises:
        DataError: They are no whole numbers, or too large, or of another shape.
    """
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.ndim == 2 and len(labels) == count and _is_one_hot(labels):
        labels = labels.argmax(1)
    if labels.shape != (count,):
        raise DataError(
            f"labels in {source} must have shape ({count},), ({count}, 1), or be one-hot of shape "
            f"({count}, classes), got {labels.shape}."
        )
    with np.errstate(invalid="ignore"):
        numbers: NDArray[np.int64] = labels.astype(np.int64)
    if (others := labels[numbers != labels]).size:
        raise DataError(f"labels in {source} must be whole numbers, got {others[0]}.")
    if (largest := numbers.max(initial=0)) >= MOST_CLASSES:
        raise DataError(f"labels in {source} must be below {MOST_CLASSES}, got {largest}.")
    return numbers


def _is_one_hot(labels: NDArray[np.generic]) -> bool:
    """Whether every row has one 1 and else zeros."""
    ones = labels == 1
    return bool(np.all(ones | (labels == 0)) and np.all(ones.sum(1) == 1))

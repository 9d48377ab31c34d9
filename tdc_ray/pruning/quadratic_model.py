"""A quadratic model of a group's loss: what any joint cut costs.

``second_order`` makes it from a few backward passes, ``joint_increase`` predicts from it and
searches.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuadraticModel:
    """The increase of the loss with any joint cut of inner units, to second order."""

    levels: Mapping[str, tuple[int, ...]]
    """For every unit the widths below its own that were looked at, rising."""

    products: tuple[tuple[float, ...], ...]
    """Mean products of what two cuts do to the prediction: a row and a column for every unit's
    every level, in this order. A scheme's increase is the sum over those of its cuts."""

"""A quadratic model of a group's loss: what any joint cut costs.

``second_order`` makes it from a few backward passes, ``joint_growth`` predicts from it and
searches.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuadraticModel:
    """By how much the loss grows with any joint cut of inner units, to second order."""

    levels: Mapping[str, tuple[int, ...]]
    """For every unit the widths below its own that were looked at, rising."""

    products: tuple[tuple[float, ...], ...]
    """Mean products of what two cuts do to the prediction: a row and a column for every unit's
    every level, in this order. A scheme's growth is the sum over those of its cuts."""

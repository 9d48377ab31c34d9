"""What schemes are predicted to cost: the units' own increases, corrected by what was measured.

The increase of the loss is taken to add up over the units, each unit's own times a factor. The
factors are 1 at first; every measured scheme is a linear equation for them (Bayesian linear
regression).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tdc_ray.pruning.knapsack import LEAST_FACTOR, FactorArray, loss_curves
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.space import Scheme, Space

FACTOR_SPREAD = 0.3
"""Prior standard deviation of a unit's factor."""

PREDICTION_ERROR = 0.1
"""Standard deviation of a prediction with the right factors, as a share of the mean increase."""


@dataclass(frozen=True)
class Predictor:
    """Predicts the increase of a group's loss with any scheme."""

    space: Space
    curves: Mapping[str, FactorArray]
    """For every unit, its own increase at every width: `loss_curves`."""

    factors: FactorArray
    """The units' likeliest factors, ``(U,)``."""

    root: FactorArray
    """A root of their covariance, ``(U, U)``."""

    scale: float
    """Of all increases alike, since units affect each other."""

    @classmethod
    def of(cls, request: ProposalRequest, memory: Sequence[MemoryEntry]) -> "Predictor":
        """Learn from a group's own entries of the memory bank; others are left out."""
        space, curves = request.space, loss_curves(request.space, request.sensitivities)
        entries = [entry for entry in memory if entry.group == request.group]
        size = len(space.units)
        pieces = np.array([_pieces(space, curves, entry.widths) for entry in entries])
        pieces = pieces.reshape(-1, size)  # (entries, U)
        increases = np.array([entry.increase(request.loss_base) for entry in entries])
        usable = np.isfinite(increases)
        pieces, increases = pieces[usable], increases[usable]
        if not len(increases) or pieces.sum() <= 0 or increases.mean() <= 0:
            return cls(space, curves, np.ones(size), FACTOR_SPREAD * np.eye(size), 1.0)
        scale = float(increases.sum() / pieces.sum())
        pieces = pieces * scale / (PREDICTION_ERROR * increases.mean())
        target = increases / (PREDICTION_ERROR * increases.mean())
        precision = np.eye(size) / FACTOR_SPREAD**2
        covariance = np.linalg.inv(precision + pieces.T @ pieces)
        mean = covariance @ (precision @ np.ones(size) + pieces.T @ target)
        return cls(space, curves, mean, np.linalg.cholesky(covariance), scale)

    @cached_property
    def positive(self) -> FactorArray:
        """The factors as the knapsack takes them, ``(U,)``: cuts that seem to help are chance."""
        return np.maximum(self.factors, LEAST_FACTOR)

    @cached_property
    def spreads(self) -> FactorArray:
        """Standard deviations of the factors, ``(U,)``."""
        spreads: FactorArray = np.linalg.norm(self.root, axis=1)
        return spreads

    def increase(self, scheme: Scheme) -> float:
        """Predict the increase with a scheme."""
        pieces = np.array(_pieces(self.space, self.curves, scheme))
        return float(self.scale * pieces @ self.positive)

    def standard_error(self, scheme: Scheme) -> float:
        """Return the standard deviation of what is predicted."""
        pieces = self.scale * np.array(_pieces(self.space, self.curves, scheme))
        known = PREDICTION_ERROR * float(pieces @ self.positive)
        return float(np.hypot(np.linalg.norm(pieces @ self.root), known))

    def change(self, number: int, width: int, other: int) -> tuple[float, float]:
        """Predict by how much the increase changes with one unit's width, and its standard error.

        Args:
            number: The unit's place among the units.
            width: The width before.
            other: The width after.
        """
        curve = self.curves[self.space.units[number].name]
        piece = self.scale * float(curve[other] - curve[width])
        return piece * float(self.positive[number]), abs(piece) * float(self.spreads[number])


def _pieces(space: Space, curves: Mapping[str, FactorArray], scheme: Scheme) -> list[float]:
    """Return every unit's own increase at its width in a scheme."""
    return [curves[unit.name][scheme[unit.name]] for unit in space.units]

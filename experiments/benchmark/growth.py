"""How costs grow: what is measured over one number while the others stay small, and the fit."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmark.timing import in_turns, peak_mb

LINEAR = 1.1
"""Exponents up to here count as linear: they are fitted to times."""


@dataclass(frozen=True, kw_only=True)
class ScalingFlags:
    """How much is measured."""

    repeats: int
    smoke: bool

    def some(self, *values: int) -> tuple[int, ...]:
        """Return the values of an axis; with --smoke the first two."""
        return values[:2] if self.smoke else values


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One cost over one number."""

    what: str
    over: str
    unit: str
    points: tuple[tuple[float, tuple[float, ...]], ...]
    """The number, and the values that were measured with it."""

    reason: str = "not known why"
    """Why it may grow faster than linearly."""

    @property
    def medians(self) -> list[float]:
        """The middle value at every point."""
        return [statistics.median(values) for _, values in self.points]

    @property
    def exponent(self) -> float:
        """The least-squares slope of the logarithms of the medians over those of the numbers."""
        xs = np.log([x for x, _ in self.points])
        slope, _ = np.polyfit(xs, np.log(np.maximum(self.medians, 1e-12)), 1)
        return float(slope)

    @property
    def last_exponent(self) -> float:
        """The slope between the last two points, where what does not grow weighs least."""
        (x_1, _), (x_2, _) = self.points[-2:]
        before, after = np.maximum(self.medians[-2:], 1e-12)
        return math.log(after / before) / math.log(x_2 / x_1)

    @property
    def is_linear(self) -> bool:
        """Whether it grows no faster than linearly."""
        return max(self.exponent, self.last_exponent) <= LINEAR


Way = tuple[float, Callable[[], object]]
"""The number, and what to time."""


def timed(
    flags: ScalingFlags, what: str, over: str, ways: Sequence[Way], *, reason: str = Axis.reason
) -> Axis:
    """Time a function called with several numbers, alternately.

    CPU seconds of this process, all threads together: other work on the machine changes them
    little, and the question here is how work grows.
    """
    found = in_turns({str(x): way for x, way in ways}, flags.repeats, clock=time.process_time)
    points = tuple((x, found[str(x)]) for x, _ in ways)
    return Axis(what=what, over=over, unit="CPU s", points=points, reason=reason)


def peaks(
    what: str, over: str, xs: Sequence[float], work: Callable[..., object], *arguments: Any
) -> Axis:
    """Measure the peak memory above what is imported, each in a process of its own.

    Args:
        what: What is measured.
        over: Over which number.
        xs: The numbers.
        work: Called with a number and the arguments.
        arguments: Must be picklable.
    """
    points = tuple((x, (peak_mb(work, x, *arguments)[1],)) for x in xs)
    return Axis(what=what, over=over, unit="MB", points=points)

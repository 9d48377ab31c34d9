"""The models of a run side by side: base, TDC, and what TDC was compared with."""

from collections.abc import Mapping
from dataclasses import dataclass

from tdc_ray.reporting.paper import NO_PRUNING
from tdc_ray.runs.results import Results

LONGER_BASE = "base trained on"
"""What the base is called that was trained on by as many macs as TDC spent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRow:
    """A model with its score, its size, and what making it took."""

    label: str
    score: float
    macs: float
    num_params: float
    train_steps: int
    train_macs: float
    search_macs: float
    images_per_second: float | None
    """None means that it was not measured apart."""

    metrics: Mapping[str, float]
    """Scores beside the metric."""

    @property
    def macs_spent(self) -> float:
        """What training and search took together."""
        return self.train_macs + self.search_macs


def model_rows(results: Results) -> list[ModelRow]:
    """Return the base, what it was trained on to if it was, and TDC."""
    base, tdc, comparison = results.base, results.tdc, results.comparison
    rows = [
        ModelRow(
            label="base",
            score=base.score,
            macs=base.macs,
            num_params=base.num_params,
            train_steps=base.train_steps,
            train_macs=base.train_macs,
            search_macs=0.0,
            images_per_second=base.images_per_second,
            metrics=base.metrics,
        )
    ]
    if comparison is not None:
        rows.append(
            ModelRow(
                label=LONGER_BASE,
                score=comparison.score,
                macs=base.macs,
                num_params=base.num_params,
                train_steps=comparison.steps,
                train_macs=comparison.train_macs,
                search_macs=0.0,
                images_per_second=None,
                metrics=comparison.metrics,
            )
        )
    rows.append(
        ModelRow(
            label=NO_PRUNING if results.prune.method == "none" else "TDC",
            score=tdc.score,
            macs=tdc.macs,
            num_params=tdc.num_params,
            train_steps=tdc.train_steps,
            train_macs=tdc.train_macs,
            search_macs=results.prune.search_macs,
            images_per_second=tdc.images_per_second,
            metrics=tdc.metrics,
        )
    )
    return rows

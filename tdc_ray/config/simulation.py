"""A simulated cluster: flags of ``tdc-ray simulate``."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from tdc_ray.config.validation import NonNegativeFloat, PositiveFloat, PositiveInt, settings


@settings("simulate")
class SimulationConfig:
    """A cluster, what happens to it, and what work takes there."""

    workers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (10, 30, 100, 300, 1000)
    """Numbers of workers to try."""

    costs: Path | None = None
    """A run whose measured times, and settings, are used; None means that times follow from
    macs."""

    macs_per_second: PositiveFloat = 1e12
    """Speed of one worker, where nothing was measured."""

    failures_per_hour: NonNegativeFloat = 0.0
    """How often each worker dies, on average; its item starts again."""

    joins_per_hour: NonNegativeFloat = 0.0
    """How often a worker joins while some are missing, on average."""

    trials: PositiveInt = 1
    """Runs of these settings that share the workers, as in a sweep."""

    simulation_seed: int = 0
    """Seed of failures and joins."""

"""The settings of a simulated cluster."""

from dataclasses import dataclass
from pathlib import Path

from tdc_ray.config.validation import at_least, require


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationConfig:
    """A cluster, what happens to it, and what work takes there."""

    workers: tuple[int, ...] = (10, 30, 100, 300, 1000)
    """Numbers of workers to try."""

    costs: Path | None = None
    """A run whose measured times, and settings, are taken; None: times follow from macs."""

    macs_per_second: float = 1e12
    """Of one worker, where nothing was measured."""

    failures_per_hour: float = 0.0
    """How often each worker dies, on the average; its item starts again."""

    joins_per_hour: float = 0.0
    """How often a worker joins while some are missing, on the average."""

    trials: int = 1
    """Runs of these settings that share the workers, as in a sweep."""

    simulation_seed: int = 0
    """Of failures and joins."""

    def __post_init__(self) -> None:
        require("simulate", self, "workers", "1 and more", ok=min(self.workers, default=0) >= 1)
        above = self.macs_per_second > 0
        require("simulate", self, "macs_per_second", "above 0", ok=above)
        at_least(0, "simulate", self, "failures_per_hour", "joins_per_hour")
        at_least(1, "simulate", self, "trials")

"""How timesteps are grouped and what each group may cost: ``--plan.*``."""

from dataclasses import dataclass
from typing import Literal

from tdc_ray.config.validation import at_least, require
from tdc_ray.errors import ConfigError

FlopsSchedule = Literal["snr", "constant", "uni-increasing", "uni-decreasing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """How the timesteps are grouped and what each group may cost."""

    num_groups: int = 10
    """Number of groups before empty ones vanish (the paper's N)."""

    min_macs_share: float = 0.5
    """Share of the base's macs that the easiest timestep gets, in (0, 1] (the paper's k)."""

    schedule: FlopsSchedule = "snr"
    """How the limits move with t (the paper's FLOPs schedule, Table II)."""

    match_snr_mean: bool = False
    """Give a uni-increasing or uni-decreasing schedule the mean limit, over the sampling steps, of
    the SNR schedule, by another least limit."""

    min_group_size: int = 1
    """Groups of fewer timesteps than this join their neighbour."""

    def __post_init__(self) -> None:
        at_least(1, "plan", self, "num_groups", "min_group_size")
        require("plan", self, "min_macs_share", "in (0, 1]", ok=0 < self.min_macs_share <= 1)
        if self.match_snr_mean and self.schedule not in ("uni-increasing", "uni-decreasing"):
            raise ConfigError(
                "plan.match_snr_mean goes with plan.schedule uni-increasing or uni-decreasing, "
                f"got {self.schedule}; constant has the SNR schedule's mean already."
            )

"""How timesteps are grouped and what each group may cost: ``--plan.*``."""

from typing import Annotated, Literal

from pydantic import Field

from tdc_ray.config.validation import PositiveInt, refuse, require, settings

FlopsSchedule = Literal["snr", "constant", "uni-increasing", "uni-decreasing", "measured"]


@settings("plan")
class PlanConfig:
    """How the timesteps are grouped and what each group may cost."""

    num_groups: PositiveInt = 10
    """Number of groups before empty ones vanish (the paper's N)."""

    min_macs_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the base's macs that the easiest timestep gets, in (0, 1] (the paper's k)."""

    schedule: FlopsSchedule = "snr"
    """How the limits move with t (the paper's FLOPs schedule, Table II). measured: the groups are
    the SNR schedule's, and after stage 1 one budget is shared among them so that all together lose
    the least, by quadratic models of what a cut, refitted, does to each. For the inner space."""

    mean_macs_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Mean over the sampling steps of a measured schedule's limits, as a share of the base's macs;
    None means that of the SNR schedule."""

    match_snr_mean: bool = False
    """Set the least limit of a uni-increasing or uni-decreasing schedule so that its mean limit,
    over the sampling steps, is that of the SNR schedule."""

    min_group_size: PositiveInt = 1
    """Groups of fewer timesteps than this join their neighbour."""

    def __post_init__(self) -> None:
        if self.match_snr_mean and self.schedule not in ("uni-increasing", "uni-decreasing"):
            refuse(
                "plan.match_snr_mean goes with plan.schedule uni-increasing or uni-decreasing, "
                f"got {self.schedule}; constant has the SNR schedule's mean already."
            )
        fits = self.mean_macs_share is None or self.schedule == "measured"
        require("plan", self, "mean_macs_share", "None unless plan.schedule is measured", ok=fits)

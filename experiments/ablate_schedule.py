"""Table II: how the limits move with the timestep.

    python experiments/ablate_schedule.py --preset digits
    python experiments/ablate_schedule.py --smoke

Whole runs of TDC that differ in the FLOPs schedule. The paper does not define the last three of
its own rows. Here constant gives every group the mean limit of the SNR schedule, uni-increasing
and uni-decreasing split the timesteps evenly and let the limit grow or fall linearly, ending at
the base's macs; in a second variant of these two the limits have the mean of the SNR schedule, so
that compute does not decide. Measured, which the paper does not have, shares the SNR schedule's
mean among its groups by what cuts cost in each. The mean limit of each is in the table. All runs
of a seed share one base.

Hardware and hours: `digits` with two seeds, a quarter of the preset's steps and images
(`--steps-share` 0.25), takes about 25 minutes on 2 CPU cores, 15 with 0.15 of them; `cifar10` days
on GPUs (estimates from macs).

The paper (FID, FLOPs, params, CIFAR-10): SNR 3.76 at 6.56 G, 48.7 M; constant 3.91 at 6.79 G,
49.5 M; uni-increasing 3.88 at 6.85 G, 43.2 M; uni-decreasing 4.11 at 6.21 G, 45.1 M.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common import SweepFlags, domains_of, parse_flags, swept
from output import paper_column, plot_bars, scores_of_settings, write_sweep

from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.runs.sweep.space import Value, setting_name, with_params

SCHEDULE, MATCH = "plan.schedule", "plan.match_snr_mean"
ROWS = (
    ("snr", False),
    ("constant", False),
    ("uni-increasing", False),
    ("uni-decreasing", False),
    ("uni-increasing", True),
    ("uni-decreasing", True),
    ("measured", False),
)
PAPER = {
    "cifar10": {
        "base": "4.08",
        "snr": "3.76 (6.56 G)",
        "constant": "3.91 (6.79 G)",
        "uni-increasing": "3.88 (6.85 G)",
        "uni-decreasing": "4.11 (6.21 G)",
    }
}


@dataclass(frozen=True, kw_only=True)
class ScheduleFlags(SweepFlags):
    """Flags of this experiment."""

    seeds: tuple[int, ...] = (0, 1)
    """Training seeds."""


def main(flags: ScheduleFlags) -> None:
    """Run all schedules and seeds; write table, plot and record."""
    folder = flags.storage / f"ablate_schedule-{flags.preset}"
    config = flags.config(flags.seeds[0])
    points: list[Mapping[str, Value]] = [
        {SCHEDULE: schedule, MATCH: match}
        for schedule, match in (ROWS[:2] if flags.smoke else ROWS)
    ]
    results = swept(flags, folder, domains_of(points), points, objectives=("score", "macs"))
    titles, paper = {}, paper_column(PAPER, flags.preset)
    for one in points:
        row = f"{one[SCHEDULE]}{', matched' if one[MATCH] else ''}"
        wanted = with_params(config, one, config.seed)
        plan = plan_groups(wanted.diffusion, wanted.plan, wanted.sampler)
        titles[setting_name(one)] = title = f"{row} (mean limit {plan.mean_limit_share:.3f} F)"
        if row in paper:
            paper[title] = paper[row]
    write_sweep(folder, "ablate_schedule", flags, results, titles, paper)
    scores = scores_of_settings(results)
    bars = {title: scores[setting] for setting, title in titles.items()}
    plot_bars(folder, "ablate_schedule", bars, results.metric)


if __name__ == "__main__":
    main(parse_flags(__doc__, ScheduleFlags))

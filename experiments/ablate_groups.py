"""Table III: the number of groups, N = 4 to 20, without pruning.

    python experiments/ablate_groups.py --preset digits
    python experiments/ablate_groups.py --smoke

Whole runs of TDC without pruning that differ in N. The fine-tunes of all experts together take the
same steps in every row, those of the preset's own N, so all rows train for as many macs (up to
rounding): with `--per-expert` every expert trains for the preset's steps instead, and rows of more
groups for more macs. All runs of a seed share one base.

Hardware and hours: `digits` with two seeds, a quarter of the preset's steps and images
(`--steps-share` 0.25), takes about 15 minutes on 2 CPU cores, `cifar10` days on GPUs
(estimates from macs).

The paper (FID, CIFAR-10): N = 4, 8, 10, 15, 20 gives 3.62, 3.56, 3.52, 3.56, 3.60.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from common import SweepFlags, domains_of, parse_flags, swept
from output import paper_column, plot_sweep, write_sweep

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.runs.sweep.space import Value, setting_name, with_params

FIELD, STEPS, WARMUP = "plan.num_groups", "finetune.num_steps", "finetune.num_warmup_steps"
VALUES = (4, 8, 10, 15, 20)
PAPER = {
    "cifar10": {
        "base": "4.08",
        "N = 4": "3.62",
        "N = 8": "3.56",
        "N = 10": "3.52",
        "N = 15": "3.56",
        "N = 20": "3.60",
    }
}


@dataclass(frozen=True, kw_only=True)
class GroupsFlags(SweepFlags):
    """Flags of this experiment."""

    seeds: tuple[int, ...] = (0, 1)
    """Training seeds."""
    per_expert: bool = False
    """Train every expert for the preset's steps, however many experts there are."""

    def config(self, seed: int) -> RunConfig:
        """Return the settings without pruning."""
        config = super().config(seed)
        return replace(config, prune=replace(config.prune, method="none"))


def point(config: RunConfig, num_groups: int, *, per_expert: bool) -> dict[str, Value]:
    """Return the setting of a row; empty groups have no steps."""
    train, share = config.finetune, 1.0
    if not per_expert:
        plan, own = (
            plan_groups(one.diffusion, one.plan, one.sampler)
            for one in (config, with_params(config, {FIELD: num_groups}, config.seed))
        )
        share = len(plan.groups) / len(own.groups)
    steps, warmup = (round(share * steps) for steps in (train.num_steps, train.num_warmup_steps))
    return {FIELD: num_groups, STEPS: max(1, steps), WARMUP: warmup}


def main(flags: GroupsFlags) -> None:
    """Run all numbers of groups and seeds; write table, plot and record."""
    folder = flags.storage / f"ablate_groups-{flags.preset}{'-per-expert' * flags.per_expert}"
    config = flags.config(flags.seeds[0])
    points: list[Mapping[str, Value]] = [
        point(config, number, per_expert=flags.per_expert)
        for number in (VALUES[:2] if flags.smoke else VALUES)
    ]
    results = swept(flags, folder, domains_of(points), points)
    titles = {setting_name(one): f"N = {one[FIELD]}" for one in points}
    paper = paper_column(PAPER, flags.preset)
    write_sweep(folder, "ablate_groups", flags, results, titles, paper)
    plot_sweep(folder, "ablate_groups", FIELD, results, "N")


if __name__ == "__main__":
    main(parse_flags(__doc__, GroupsFlags))

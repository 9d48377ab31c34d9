"""After how many steps is a base at its plateau? Its loss by the steps that it was trained for.

    python experiments/plateau.py --preset digits --architecture tiny --steps 4000 8000 16000
    python experiments/plateau.py --smoke

A base of every seed is trained for each number of steps (`--steps`, rising, each twice the one
before, whose training it goes on with). Its loss over all timesteps is held against that of the
one before, on the images and noise that `equal_compute` compares on: it is at its plateau where
that falls by less than 1 %. With `--held-out-of-base` stage 1 has not seen those images; without,
part of the fall may be that it learns them by heart.
In the same storage `equal_compute --base-steps` takes the bases from here.

Hardware and hours: the `tiny` network on digits takes about 15 minutes for 16,000 steps on one
CPU core.

The paper does not have this: it trains its bases for as long as their papers say.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from common import Flags, base_folder, base_of, parse_flags, workers
from equal_compute import loss_text
from output import mean_and_spread, plot_lines, write_record, write_table
from stages import Losses, loss_beside

from tdc_ray.config.compare import CompareConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.runs.run import local_cpus
from tdc_ray.storage.provenance import commit

PLATEAU = 0.01
"""Fall of the loss over a doubling of steps below which a base is at its plateau."""


@dataclass(frozen=True, kw_only=True)
class PlateauFlags(Flags):
    """Flags of this experiment."""

    steps: tuple[int, ...] = (2000, 4000, 8000, 16000)
    """Steps of the bases, rising."""
    num_noised: int = 4096
    """Noised images of each group that losses are compared on."""

    def config(self, seed: int) -> RunConfig:
        """Return the preset's settings for one seed, with what losses are compared on."""
        config = super().config(seed)
        return replace(config, compare=CompareConfig(num_images=self.num_noised))


def losses_of(flags: PlateauFlags, seed: int) -> dict[int, Losses]:
    """Train the bases of a seed; return each one's losses beside those of the one before."""
    bases: dict[int, Path] = {}
    shorter = None  # base, whose training the next one goes on with
    for steps in flags.steps:
        some = replace(flags, base_steps=steps)
        bases[steps] = base_of(some, seed, shorter)
        shorter = base_folder(some, seed)
    config, root = flags.config(seed), flags.storage / f"plateau-{flags.variant}" / f"seed-{seed}"
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    with workers(config, root, flags.store) as pool:
        found = pool.run(
            {
                str(steps): loss_beside(
                    config,
                    groups,
                    [bases[steps]] * len(groups),
                    bases[before],
                    root / f"losses-{steps}",
                )
                for before, steps in pairwise(flags.steps)
            }
        )
    return {int(steps): losses for steps, losses in found.items()}


def main(flags: PlateauFlags) -> None:
    """Run all seeds; write table, plot and record after each of them."""
    if flags.smoke:
        flags = replace(flags, steps=(10, 20, 30, 40, 60), num_noised=180)
    folder = flags.storage / f"plateau-{flags.variant}"
    found: dict[int, dict[int, Losses]] = {}
    with connected(local_cpus(flags.config(flags.seeds[0]).compute)):  # one Ray for all
        for seed in flags.seeds:
            found[seed] = losses_of(flags, seed)
            write(flags, folder, found)


def write(flags: PlateauFlags, folder: Path, found: Mapping[int, Mapping[int, Losses]]) -> None:
    """Write table, plot and record of the seeds that are done."""
    rows, lines = [], {}
    for steps in flags.steps[1:]:
        of_seeds = [losses[steps] for losses in found.values()]
        loss = mean_and_spread([one.mean.loss_tdc for one in of_seeds], 5)
        falls = [-one.mean.difference / one.mean.loss_base for one in of_seeds]
        at_plateau = "yes" if fmean(falls) < PLATEAU else "no"
        rows.append([str(steps), loss, loss_text(of_seeds), at_plateau])
    for seed, losses in found.items():
        first = losses[flags.steps[1]].mean.loss_base
        rest = ((float(steps), [each.mean.loss_tdc]) for steps, each in losses.items())
        lines[f"seed {seed}"] = [(float(flags.steps[0]), [first]), *rest]
    columns = ["steps", "loss", "against the one before", "at its plateau"]
    write_table(folder, "plateau", columns, rows, f"Seeds {', '.join(map(str, found))}.")
    plot_lines(folder, "plateau", lines, xlabel="steps", ylabel="loss over all timesteps")
    record = {
        str(seed): {str(steps): asdict(each) for steps, each in losses.items()}
        for seed, losses in found.items()
    }
    write_record(folder, "plateau", flags, {commit()}, {"losses": record})


if __name__ == "__main__":
    main(parse_flags(__doc__, PlateauFlags))

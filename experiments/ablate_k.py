"""Figures 6 and 8: how much may be pruned, k = 0.3 to 0.7.

    python experiments/ablate_k.py --preset digits
    python experiments/ablate_k.py --preset mnist-32-ldm --data mnist.npz --first-stage first_stage
    python experiments/ablate_k.py --smoke

Whole runs of TDC that differ in k, the share of the base's macs that the easiest timesteps get.
All runs of a seed share one base, and whatever else follows from the same inputs: the groups do
not depend on k, so the sensitivities of the base and the last group's expert, which keeps all of
it, are shared. `--search optuna` lets Optuna choose k in the same range, for score and macs.

Figure 6 is CIFAR-10 (`--preset cifar10 --steps-share 1`), Figure 8 latent diffusion on FFHQ
(`--preset ffhq256-ldm --steps-share 1`); `mnist-32-ldm` is a small version of Figure 8, in the
latents of a first stage that `tdc-ray train-autoencoder` trained.

Hardware and hours: `digits` with three seeds, a quarter of the preset's steps and images
(`--steps-share` 0.25), takes about 35 minutes on 2 CPU cores, `cifar10` days on GPUs
(estimates from macs).

The paper (FID) shows both figures as plots, stable over k, and prints no numbers in them; at
k = 0.5 Table I has 3.76 on CIFAR-10 and 4.73 on FFHQ.
"""

from dataclasses import dataclass
from typing import Literal

from common import SweepFlags, parse_flags, swept
from output import paper_column, plot_sweep, write_sweep

from tdc_ray.runs.sweep.space import Choices, Domain, Range

FIELD = "plan.min_macs_share"
VALUES = (0.3, 0.4, 0.5, 0.6, 0.7)
PAPER = {
    "cifar10": {"base": "4.08", "k = 0.5": "3.76"},
    "ffhq256-ldm": {"base": "5.0", "k = 0.5": "4.73"},
}


@dataclass(frozen=True, kw_only=True)
class KFlags(SweepFlags):
    """Flags of this experiment."""

    search: Literal["grid", "optuna"] = "grid"
    """The five values of the paper, or --num-trials that Optuna (TPE) chooses between them."""
    num_trials: int = 8
    """Values of k that Optuna tries."""


def main(flags: KFlags) -> None:
    """Run all values and seeds; write table, plot and record."""
    folder = flags.storage / f"ablate_k-{flags.preset}-{flags.search}"
    values = (VALUES[0], VALUES[-1]) if flags.smoke else VALUES
    domain: Domain = Choices(values)
    how = "grid"
    if flags.search == "optuna":
        domain, how = Range(VALUES[0], VALUES[-1]), "tpe"
    results = swept(
        flags,
        folder,
        {FIELD: domain},
        search=how,
        num_trials=2 if flags.smoke else flags.num_trials,
        objectives=("score", "macs"),
    )
    titles = {
        setting.name: f"k = {setting.params[FIELD]:.3g}"
        for setting in results.settings
        if setting.num_done
    }
    paper = paper_column(PAPER, flags.preset)
    write_sweep(folder, "ablate_k", flags, results, titles, paper)
    plot_sweep(folder, "ablate_k", FIELD, results, "k")


if __name__ == "__main__":
    main(parse_flags(__doc__, KFlags))

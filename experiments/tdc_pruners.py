"""Table VI: TDC with each pruner.

    python experiments/tdc_pruners.py --preset digits
    python experiments/tdc_pruners.py --smoke

Whole runs of TDC that differ in what prunes the groups: random, magnitude, LAMP, Taylor and
Diff-Pruning scores and the proxy, each as the paper has it, without a refit, and the proxy with
its refit too. All runs of a seed share one base. `--proxy llm --llm.model NAME` makes the proxy a
language model.

Hardware and hours: `digits` with three seeds, a quarter of the preset's steps and images
(`--steps-share` 0.25), takes about 25 minutes on 2 CPU cores, `cifar10` days on GPUs
(estimates from macs).

The paper (FID): on CIFAR-10 original 4.08, random 3.95, magnitude 3.88, Taylor 3.90, Diff-Pruning
3.85, proxy 3.76; on FFHQ (LDM) 5.0, 4.97, 4.86, 4.89, 4.81, 4.73. Its
magnitude pruning is cited as LAMP (arXiv:2010.07611), so its numbers stand beside both.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from common import ProxyFlags, SweepFlags, domains_of, parse_flags, swept
from output import paper_column, plot_bars, scores_of_settings, write_sweep

from tdc_ray.runs.sweep.space import Value, setting_name

METHOD, REFIT = "prune.method", "prune.refit"
PAPER = {
    "cifar10": {
        "base": "4.08",
        "random": "3.95",
        "magnitude": "3.88",
        "LAMP": "3.88",
        "Taylor": "3.90",
        "Diff-Pruning": "3.85",
        "proxy": "3.76",
    },
    "ffhq256-ldm": {
        "base": "5.0",
        "random": "4.97",
        "magnitude": "4.86",
        "LAMP": "4.86",
        "Taylor": "4.89",
        "Diff-Pruning": "4.81",
        "proxy": "4.73",
    },
}


@dataclass(frozen=True, kw_only=True)
class PrunerFlags(SweepFlags, ProxyFlags):
    """Flags of this experiment."""


def points_of(flags: PrunerFlags) -> dict[str, Mapping[str, Value]]:
    """Return the setting of every row; with --smoke of some."""
    rows: dict[str, Mapping[str, Value]] = {
        "random": {METHOD: "random", REFIT: "none"},
        "magnitude": {METHOD: "magnitude", REFIT: "none"},
        "LAMP": {METHOD: "lamp", REFIT: "none"},
        "Taylor": {METHOD: "taylor", REFIT: "none"},
        "Diff-Pruning": {METHOD: "diff-pruning", REFIT: "none"},
        "proxy": {METHOD: flags.proxy, REFIT: "none"},
        "proxy with refit": {METHOD: flags.proxy, REFIT: "least-squares"},
    }
    left_out = ("random", "LAMP", "Taylor", "Diff-Pruning", "proxy") if flags.smoke else ()
    return {name: row for name, row in rows.items() if name not in left_out}


def main(flags: PrunerFlags) -> None:
    """Run all pruners and seeds; write table, plot and record."""
    folder = flags.storage / f"tdc_pruners-{flags.preset}-{flags.proxy}"
    points = points_of(flags)
    results = swept(flags, folder, domains_of([*points.values()]), [*points.values()])
    titles = {setting_name(point): row for row, point in points.items()}
    paper = paper_column(PAPER, flags.preset)
    write_sweep(folder, "tdc_pruners", flags, results, titles, paper)
    scores = scores_of_settings(results)
    bars = {row: scores[setting] for setting, row in titles.items()}
    plot_bars(folder, "tdc_pruners", bars, results.metric)


if __name__ == "__main__":
    main(parse_flags(__doc__, PrunerFlags))

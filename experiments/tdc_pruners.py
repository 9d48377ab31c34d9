"""Table VI: TDC with each pruner.

    python experiments/tdc_pruners.py --preset digits
    python experiments/tdc_pruners.py --smoke

Whole runs of TDC that differ in what prunes the groups: random, magnitude, Taylor and Diff-Pruning
scores and the proxy, each as the paper has it, without a refit, and the proxy with its refit too.
All runs of a seed share one base. `--method llm` makes the proxy a language model.

Hardware and hours: `digits` about half an hour a seed on 2 CPU cores. `cifar10` takes days on GPUs
(an estimate from macs).

The paper (FID): on CIFAR-10 original 4.08, random 3.95, magnitude 3.88, Taylor 3.90, Diff-Pruning
3.85, proxy 3.76; on FFHQ (LDM) 5.0, 4.97, 4.86, 4.89, 4.81, 4.73.
"""

from dataclasses import asdict, dataclass, replace
from statistics import mean

from common import Flags, parse_flags, run_once
from output import mean_and_spread, paper_column, plot_bars, write_record, write_table

from tdc_ray.prune_settings import PruneMethod
from tdc_ray.results import Results

PAPER = {
    "cifar10": {
        "original": "4.08",
        "random": "3.95",
        "magnitude": "3.88",
        "Taylor": "3.90",
        "Diff-Pruning": "3.85",
        "proxy": "3.76",
    }
}


@dataclass(frozen=True, kw_only=True)
class PrunerFlags(Flags):
    """Flags of this experiment."""

    method: PruneMethod = "offline"
    """Which proxy: offline or llm."""
    steps_share: float = 0.25


def rows_of(flags: PrunerFlags) -> dict[str, tuple[PruneMethod, bool]]:
    """Give the method of every row, and whether there is a refit; with --smoke some rows."""
    rows: dict[str, tuple[PruneMethod, bool]] = {
        "random": ("random", False),
        "magnitude": ("magnitude", False),
        "Taylor": ("taylor", False),
        "Diff-Pruning": ("diff-pruning", False),
        "proxy": (flags.method, False),
        "proxy with refit": (flags.method, True),
    }
    left_out = ("random", "Taylor", "Diff-Pruning") if flags.smoke else ()
    return {name: row for name, row in rows.items() if name not in left_out}


def main(flags: PrunerFlags) -> None:
    """Run all seeds and write the table."""
    folder = flags.storage / f"tdc_pruners-{flags.preset}"
    found: dict[str, list[Results]] = {row: [] for row in rows_of(flags)}
    for seed in flags.seeds:
        config = flags.config(seed)
        for row, (method, refit) in rows_of(flags).items():
            prune = replace(
                config.prune, method=method, refit="least-squares" if refit else "none"
            )
            run_dir = folder / f"seed-{seed}" / row.replace(" ", "-")
            found[row].append(run_once(replace(config, prune=prune), run_dir, flags.store))
    paper = paper_column(PAPER, flags.preset)
    base_results = [results.base for results in found["proxy"]]
    table = [
        [
            "original",
            mean_and_spread([base.score for base in base_results]),
            paper.get("original", "-"),
            f"{base_results[0].macs / 1e6:.2f} M",
            f"{base_results[0].num_params / 1e6:.2f} M",
            "-",
        ]
    ]
    for row, results in found.items():
        table.append(
            [
                row,
                mean_and_spread([result.tdc.score for result in results]),
                paper.get(row, "-"),
                f"{mean(result.tdc.macs for result in results) / 1e6:.2f} M",
                f"{mean(result.tdc.num_params for result in results) / 1e6:.2f} M",
                f"{mean(result.prune.search_macs for result in results):.2g}",
            ]
        )
    metric = found["proxy"][0].metric
    columns = ["pruner", metric, paper[""], "FLOPs (MACs)", "params", "search macs"]
    write_table(folder, "tdc_pruners", columns, table)
    scores = {"original": [base.score for base in base_results]}
    scores |= {row: [result.tdc.score for result in results] for row, results in found.items()}
    plot_bars(folder, "tdc_pruners", scores)
    commits = {result.commit for results in found.values() for result in results}
    record = {row: [asdict(result.tdc) for result in results] for row, results in found.items()}
    write_record(folder, "tdc_pruners", flags, commits, {"metric": metric, "rows": record})


if __name__ == "__main__":
    main(parse_flags(__doc__, PrunerFlags))

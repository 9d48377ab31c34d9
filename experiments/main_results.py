"""Table I: does TDC do better than its base, and than a base trained for as many macs?

    python experiments/main_results.py --preset digits
    python experiments/main_results.py --smoke
    python experiments/main_results.py --row PNDM=pndm.npz,macs=6.06e9,steps=800000 --preset ...

Four rows, each with mean and spread over the seeds: the base; the base trained on for as many macs
as TDC spent in all, search included (`tdc-ray run --compare equal-macs`); TDC without pruning;
TDC. All rows of a seed share one base; the longer base resumes from its last checkpoint. Each
`--row` adds another method, scored by its own images; its macs and steps are stated by who names
it.

Hardware and hours: `digits` takes about 20 minutes a seed on 2 CPU cores. `cifar10` takes some
450 k steps of 3 x 8.1 GMACs x 128 images a seed, about 1.4e18 MACs: days on one large GPU
(an estimate from macs).

The paper (FID, 100-step DDIM, k = 0.5, N = 10), on CIFAR-10: IDDPM 4.08 at 8.14 G after 500 k
steps; TDC without pruning 3.52 at 8.14 G, 280 k; TDC 3.76 at 6.56 G, 450 k. On ImageNet-64: 20.7,
17.6, 19.2 at 39.3, 39.3, 32.7 G after 1.5, 1.1, 1.3 M steps.
"""

from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

from common import Flags, parse_flags, run_once
from output import mean_and_spread, paper_column, write_record, write_samples, write_table
from released_samples import ReleasedFlags, cells_of_row, released_rows, scores_of_rows

from tdc_ray.config.compare import CompareConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.runs.results import ModelResult, Results
from tdc_ray.runs.run import local_cpus

PAPER = {
    "cifar10": {
        "base": "4.08",
        "TDC, no pruning": "3.52",
        "TDC": "3.76",
        "WaveDiff": "4.87",
        "PNDM": "4.10",
        "DDPM": "4.19",
    },
    "imagenet64": {"base": "20.7", "TDC, no pruning": "17.6", "TDC": "19.2"},
}
ROWS = ("base", "base, macs of TDC", "TDC, no pruning", "TDC")


def without_pruning(config: RunConfig) -> RunConfig:
    """The same groups, each with an expert of the base's own widths."""
    return replace(config, prune=replace(config.prune, method="none"))


def longer_base(tdc: Results) -> ModelResult:
    """The base trained on by as many macs as TDC spent."""
    found = tdc.comparison
    assert found is not None, "the run was asked for it"
    return replace(
        tdc.base, score=found.score, train_steps=found.steps, train_macs=found.train_macs
    )


def runs_of_seed(flags: Flags, folder: Path, seed: int) -> tuple[Results, Results]:
    """Run everything for one seed: TDC beside the longer base, TDC without pruning."""
    config, store = flags.config(seed), flags.store
    if flags.smoke:  # a base of equal macs trains for as long as the search takes
        config = replace(config, prune=replace(config.prune, num_rounds=1, num_passes=1))
    compared = replace(config, compare=CompareConfig(kind="equal-macs"))
    tdc = run_once(compared, folder / "tdc", store)
    return tdc, run_once(without_pruning(config), folder / "no-pruning", store)


def main(flags: ReleasedFlags) -> None:
    """Run all seeds and write the table."""
    folder = flags.storage / f"main_results-{flags.preset}"
    others = released_rows(flags, flags.config(flags.seeds[0]))
    with connected(local_cpus(flags.config(flags.seeds[0]).compute)):  # one Ray for all runs
        runs = {seed: runs_of_seed(flags, folder / f"seed-{seed}", seed) for seed in flags.seeds}
    seeds = {
        seed: dict(zip(ROWS, (tdc.base, longer_base(tdc), unpruned.tdc, tdc.tdc), strict=True))
        for seed, (tdc, unpruned) in runs.items()
    }
    metric = runs[flags.seeds[0]][0].metric
    paper = paper_column(PAPER, flags.preset)
    columns = [
        "row",
        metric,
        paper[""],
        "FLOPs (MACs)",
        "params",
        "train steps",
        "train macs",
        "search macs",
    ]
    none = dict.fromkeys(flags.seeds, 0.0)
    search = dict.fromkeys(ROWS, none)
    for row, place in (("TDC", 0), ("TDC, no pruning", 1)):
        search[row] = {seed: results[place].prune.search_macs for seed, results in runs.items()}
    table = []
    for row in ROWS:
        models = [seeds[seed][row] for seed in flags.seeds]
        table.append(
            [
                row,
                mean_and_spread([model.score for model in models]),
                paper.get(row, "-"),
                f"{mean([model.macs for model in models]) / 1e6:.2f} M",
                f"{mean([model.num_params for model in models]) / 1e6:.2f} M",
                f"{mean([model.train_steps for model in models]):.0f}",
                f"{mean([model.train_macs for model in models]):.3g}",
                f"{mean([search[row][seed] for seed in flags.seeds]):.2g}",
            ]
        )
    first = folder / f"seed-{flags.seeds[0]}"
    released = scores_of_rows(others, first / "tdc")
    table += [cells_of_row(row, released[row.name], paper.get(row.name, "-")) for row in others]
    write_table(folder, "main_results", columns, table)
    samples = ("tdc/evaluation/base", "tdc/evaluation/longer-base")
    samples += ("no-pruning/evaluation/tdc", "tdc/evaluation/tdc")
    titles = dict(zip(ROWS, (first / name for name in samples), strict=True))
    write_samples(folder, "main_results", titles, num_images=36)
    record = {
        str(seed): {
            row: asdict(model) | {"search_macs": search[row][seed]}
            for row, model in models.items()
        }
        for seed, models in seeds.items()
    }
    compared = {str(seed): asdict(tdc)["comparison"] for seed, (tdc, _) in runs.items()}
    commits = {result.commit for results in runs.values() for result in results}
    scored = {name: asdict(score) for name, score in released.items()}
    found = {"metric": metric, "seeds": record, "comparison": compared, "released": scored}
    write_record(folder, "main_results", flags, commits, found)


if __name__ == "__main__":
    main(parse_flags(__doc__, ReleasedFlags))

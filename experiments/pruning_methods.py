"""Table V: which pruning method is best at 0.7 F, without TDC?

    python experiments/pruning_methods.py --preset digits
    python experiments/pruning_methods.py --smoke

One model for all timesteps, pruned to 0.7 of the base's macs and fine-tuned: by random, magnitude,
LAMP, Taylor and Diff-Pruning scores and by the proxy, each as the paper has it, without a refit,
and the proxy with its refit too. "From scratch" trains the proxy's shape from random weights for
as many steps as the fine-tune, four and twenty times as many.

Hardware and hours: `digits` about half an hour a seed on 2 CPU cores. `cifar10` takes days on a
GPU (an estimate from macs).

The paper (FID on CIFAR-10, fine-tuned for 25 k steps): pretrained 4.08 at 8.14 G; from scratch
89.1, 16.8, 5.1 at 5.71 G after 25, 100, 500 k; random 4.9 at 6.02 G, magnitude 4.6 at 6.29 G,
Taylor 4.7 at 5.90 G, Diff-Pruning 4.4 at 5.88 G; proxy 4.2 at 5.71 G. On FFHQ (LDM, 30 k):
pretrained 5.0 at 96.1 G; from scratch 85.0, 12.7, 6.9 at 66.3 G; 6.5, 6.2, 6.2, 6.1 at 63.2, 70.8,
68.7, 66.8 G; proxy 5.8 at 66.3 G.
Its magnitude pruning is cited as LAMP (arXiv:2010.07611), so its numbers stand beside both.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from common import Flags, base_of, commits_of, parse_flags, workers
from output import mean_and_spread, paper_column, plot_bars, write_record, write_table
from stages import Model, all_timesteps, from_nothing, scores_of, untrained_like

from tdc_ray.config.prune import PruneMethod
from tdc_ray.config.run import RunConfig
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.models.units import KeptIndices
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.runs.pipelines import save_index
from tdc_ray.runs.stages.expert import Expert, make_expert
from tdc_ray.runs.stages.finetune import FinetuneResult, finetune_item
from tdc_ray.storage.files import read_json

Cost = tuple[float, float, int, float, float]
"""Macs, parameters, steps, train macs (the base's not included), search macs."""

MACS_SHARE = 0.7
METHODS: tuple[tuple[str, PruneMethod, bool], ...] = (
    ("random", "random", False),
    ("magnitude", "magnitude", False),
    ("LAMP", "lamp", False),
    ("Taylor", "taylor", False),
    ("Diff-Pruning", "diff-pruning", False),
    ("proxy", "offline", False),
    ("proxy with refit", "offline", True),
)
"""Row, method, and whether there is a refit."""

NOT_IN_SMOKE = ("random", "LAMP", "Taylor", "Diff-Pruning")

SCRATCH = {"from scratch, short": 1, "from scratch, middle": 4, "from scratch, long": 20}
"""Rows, and how many times the fine-tune's steps they train (25, 100, 500 k in the paper)."""

PAPER = {
    "cifar10": {
        "pretrained": "4.08",
        "from scratch, short": "89.1",
        "from scratch, middle": "16.8",
        "from scratch, long": "5.1",
        "random": "4.9",
        "magnitude": "4.6",
        "LAMP": "4.6",
        "Taylor": "4.7",
        "Diff-Pruning": "4.4",
        "proxy": "4.2",
    },
    "ffhq256-ldm": {
        "pretrained": "5.0",
        "from scratch, short": "85.0",
        "from scratch, middle": "12.7",
        "from scratch, long": "6.9",
        "random": "6.5",
        "magnitude": "6.2",
        "LAMP": "6.2",
        "Taylor": "6.2",
        "Diff-Pruning": "6.1",
        "proxy": "5.8",
    },
}


def task_of(
    config: RunConfig, base: Path, root: Path, method: PruneMethod, *, refit: bool
) -> GroupSearch:
    """Return the search of one row."""
    prune = replace(config.prune, method=method, refit="least-squares" if refit else "none")
    return all_timesteps(replace(config, prune=prune), base, root, MACS_SHARE)


def from_scratch(
    config: RunConfig, task: GroupSearch, root: Path, times: int
) -> tuple[GroupSearch, RunConfig]:
    """Return a search and settings that train a shape from random weights, as the base was."""
    untrained = untrained_like(
        task.context.run_dir.base_unet, root / "untrained" / "unet", config.seed
    )
    config = from_nothing(config, times * config.finetune.num_steps)
    return all_timesteps(config, untrained, root, MACS_SHARE), config


def tune(task: GroupSearch, kept: KeptIndices, config: RunConfig) -> Chain[FinetuneResult]:
    """Train a shape that is known already."""
    return (yield from result_of(finetune_item(task, kept, config.finetune, config.compute)))


def one_seed(
    config: RunConfig, base: Path, folder: Path, pruned: Collection[str], pool: Pool
) -> tuple[str, dict[str, tuple[float, Cost]]]:
    """Return the metric's name and every row's results."""
    tasks = {
        row: task_of(config, base, folder / row.replace(" ", "-"), method, refit=refit)
        for row, method, refit in METHODS
        if row in pruned
    }
    experts: dict[str, Expert] = pool.run(
        {
            row: make_expert(
                task, MemoryBank(task.context.run_dir.memory), config.finetune, config.compute
            )
            for row, task in tasks.items()
        }
    )
    rows: dict[str, Cost] = {
        row: (
            expert.macs,
            expert.num_params,
            expert.train_steps,
            expert.train_macs,
            expert.search_result.cost.macs,
        )
        for row, expert in experts.items()
    }
    shape = experts["proxy"].search_result.kept
    chains = {}
    for row, times in SCRATCH.items():
        root = folder / row.replace(",", "").replace(" ", "-")
        tasks[row], longer = from_scratch(config, tasks["proxy"], root, times)
        chains[row] = tune(tasks[row], shape, longer)
    trained: dict[str, FinetuneResult] = pool.run(chains)
    for row, result in trained.items():
        cost = (result.macs, result.num_params, result.train_steps, result.train_macs)
        rows[row] = (*cost, 0.0)
    space, stage_1 = tasks["proxy"].space, read_json(base.parent / "result.json")
    trained_for = (stage_1["train_steps"], stage_1["train_macs"])
    rows["pretrained"] = (space.macs_base, space.num_params_base, *trained_for, 0.0)
    models = {"pretrained": Model("base", base, space.macs_base)}
    for row, task in tasks.items():
        save_index(task.context.run_dir, config, [task.group])
        models[row] = Model("tdc", task.context.run_dir.experts, rows[row][0])
    metric, scores = scores_of(pool, config, folder / "scores", models, [config.evaluate.seed])
    return metric, {row: (scores[row][0], cost) for row, cost in rows.items()}


def main(flags: Flags) -> None:
    """Run all seeds and write the table."""
    folder = flags.storage / f"pruning_methods-{flags.preset}"
    left_out = NOT_IN_SMOKE if flags.smoke else ()
    pruned = [row for row, _, _ in METHODS if row not in left_out]
    found: dict[int, dict[str, tuple[float, Cost]]] = {}
    metric = ""
    for seed in flags.seeds:
        config = flags.config(seed)
        base = base_of(flags, seed)
        with workers(config, folder, flags.store) as pool:
            metric, found[seed] = one_seed(config, base, folder / f"seed-{seed}", pruned, pool)
    order = ["pretrained", *SCRATCH, *pruned]
    paper = paper_column(PAPER, flags.preset)
    table = []
    for row in order:
        scores, costs = zip(*(rows[row] for rows in found.values()), strict=True)
        macs, params, steps, train_macs, search_macs = map(fmean, zip(*costs, strict=True))
        table.append(
            [
                row,
                mean_and_spread(scores),
                paper.get(row, "-"),
                f"{macs / 1e6:.2f} M",
                f"{params / 1e6:.2f} M",
                f"{steps:.0f}",
                f"{train_macs:.3g}",
                f"{search_macs:.2g}",
            ]
        )
    columns = ["row", metric, paper[""], "FLOPs (MACs)", "params", "steps", "train macs"]
    note = (
        "Rows that are pruned come from the pretrained one, whose training is not counted again."
    )
    write_table(folder, "pruning_methods", [*columns, "search macs"], table, note)
    bars = {row: [rows[row][0] for rows in found.values()] for row in order}
    plot_bars(folder, "pruning_methods", bars, metric)
    record = {str(seed): rows for seed, rows in found.items()}
    write_record(
        folder, "pruning_methods", flags, commits_of(folder), {"metric": metric, "seeds": record}
    )


if __name__ == "__main__":
    main(parse_flags(__doc__))

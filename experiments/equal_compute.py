"""Does TDC pay at equal compute? Six ways to spend the same macs, by score and by held-out loss.

    python experiments/equal_compute.py --preset digits
    python experiments/equal_compute.py --preset mnist --data mnist.npz --base-steps 8000
    python experiments/equal_compute.py --smoke

What `tdc-ray run` takes in all, search included, is each row's total, for every seed: the base
trained on; a smaller network of TDC's macs per image, trained from nothing; one network pruned for
all timesteps to these macs and fine-tuned, as in Diff-Pruning (by Taylor scores: its own took 4.6
times all the macs of --smoke); TDC without pruning; TDC; and TDC training-free, from a base
trained on by what its fine-tunes would have taken. `--budgets 0.5 1 2` gives every row several
totals: TDC's with so many times the preset's fine-tune steps.

Beside the scores every row has its held-out loss against the base trained on, over all timesteps
alike, on the same images and noise: images that no fine-tune and no choice has seen, and with
`--held-out-of-base` no network at all. Without it stage 1 sees them, and the smaller network for
as many macs as stage 1 takes. `--base-steps` sets how far the base is trained: at its plateau the
held-out loss falls by less than 1 % over the last doubling.

Hardware and hours: `digits` takes about an hour a seed on 2 CPU cores (an estimate from macs).

The paper has no such table: it compares by training steps, without what GPT-4 and measuring take.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args

from common import Flags, commits_of, parse_flags, run_once, slug, workers
from equal_rows import (
    Budget,
    Network,
    base_for_training_free,
    from_scratch,
    pruned_for_all,
    training_free,
    without_pruning,
)
from output import mean_and_spread, plot_lines, write_record, write_table
from stages import Losses, Model, loss_beside, scores_of

from tdc_ray.config.compare import CompareConfig
from tdc_ray.config.plan import FlopsSchedule
from tdc_ray.config.prune import PruneMethod
from tdc_ray.config.run import RunConfig
from tdc_ray.config.train import Allocation
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.reporting.text import verdict
from tdc_ray.runs.results import Results
from tdc_ray.runs.run import local_cpus
from tdc_ray.storage.run_dir import RunDir

Name = Literal[
    "base trained on",
    "smaller, from scratch",
    "one network, pruned",
    "TDC, no pruning",
    "TDC",
    "TDC, training-free",
]
ROWS: tuple[Name, ...] = get_args(Name)
BASE, SMALLER, PRUNED, UNPRUNED, TDC, FREE = ROWS


@dataclass(frozen=True, kw_only=True)
class EqualFlags(Flags):
    """Flags of this experiment."""

    budgets: tuple[float, ...] = (1.0,)
    """How many times the preset's fine-tune steps TDC takes; its macs are every row's total."""
    method: PruneMethod | None = None
    """How TDC is pruned, such as taylor, whose search takes little; default: the preset's."""
    schedule: FlopsSchedule | None = None
    """How TDC's limits move with t; default: the preset's."""
    mean_macs_share: float | None = None
    """Mean of a measured schedule's limits over the sampling steps; default: that of SNR's."""
    allocation: Allocation | None = None
    """How the fine-tunes of TDC's groups share their steps; default: the preset's."""
    rows: tuple[Name, ...] = ROWS
    """Ways to spend the macs; TDC and the base trained on are always among them."""
    num_noised: int = 4096
    """Noised images of each group that losses are compared on."""

    def config(self, seed: int) -> RunConfig:
        """Return the preset's settings for one seed, TDC compared with the base trained on."""
        config = super().config(seed)
        compare = CompareConfig(kind="equal-macs", num_images=self.num_noised)
        if self.method is not None:
            config = replace(config, prune=replace(config.prune, method=self.method))
        if self.allocation is not None:
            finetune = replace(config.finetune, allocation=self.allocation)
            config = replace(config, finetune=finetune)
        plan = replace(config.plan, mean_macs_share=self.mean_macs_share)
        config = replace(config, plan=plan)
        if self.smoke:  # whose search takes more than all training
            prune = replace(config.prune, num_rounds=1, num_passes=1)
            compare = replace(compare, num_images=180)
            config = replace(config, prune=prune)
        return replace(config, compare=compare)


@dataclass(frozen=True, slots=True)
class Row:
    """What one way to spend the macs came to."""

    score: float
    train_macs: float
    """Stage 1 included."""
    search_macs: float
    macs: float
    num_params: float
    losses: Losses | None
    """None for the base trained on, which they are held against."""


Found = Mapping[float, Mapping[int, tuple[Results, dict[str, Row]]]]
"""TDC's run and the rows, by budget and seed."""


def row_of_run(results: Results, losses: Losses, before: float = 0.0) -> Row:
    """Return the row of a run's TDC; training before the run is added."""
    tdc = results.tdc
    train_macs = before + tdc.train_macs
    return Row(tdc.score, train_macs, results.prune.search_macs, tdc.macs, tdc.num_params, losses)


def rows_of(
    flags: EqualFlags, config: RunConfig, folder: Path
) -> tuple[str, Results, dict[str, Row]]:
    """Spend one total in all ways, with one seed; give the metric, TDC's run and the rows."""
    store, dirs = flags.store, {name: folder / slug(name) for name in ROWS}
    tdc_dir, free_dir = RunDir(dirs[TDC].resolve()), (folder / "free-base").resolve()
    tdc = run_once(config, dirs[TDC], store)
    budget, found = Budget.of(tdc), tdc.comparison
    assert found is not None, "the run was asked for it"
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    runs: dict[str, tuple[Results, float]] = {}
    if UNPRUNED in flags.rows:
        unpruned = without_pruning(config, budget, len(groups))
        runs[UNPRUNED] = run_once(unpruned, dirs[UNPRUNED], store), 0.0
    if FREE in flags.rows:
        with workers(config, folder, store) as pool:
            base = base_for_training_free(config, budget, tdc_dir, free_dir, store)
            longer = pool.run({"base": base})["base"]
        free = run_once(training_free(config, longer), dirs[FREE], store)
        runs[FREE] = free, budget.stage_1 + budget.beyond - budget.search
    with workers(config, folder, store) as pool:
        ways = {SMALLER: from_scratch, PRUNED: pruned_for_all}
        networks: dict[str, Network] = pool.run(
            {
                name: way(config, budget, tdc_dir.base_unet, dirs[name].resolve())
                for name, way in ways.items()
                if name in flags.rows
            }
        )
        models = {
            slug(name): Model("tdc", one.run_dir.experts, one.macs)
            for name, one in networks.items()
        }
        metric, scores = scores_of(pool, config, folder / "scores", models, [config.evaluate.seed])
        experts = {name: [one.run_dir.expert(0)] * len(groups) for name, one in networks.items()}
        for name in runs:
            run_dir = RunDir(dirs[name].resolve())
            experts[name] = [run_dir.expert(group.index) for group in groups]
        losses = pool.run(
            {
                name: loss_beside(
                    config, groups, some, tdc_dir.longer_base, folder / "losses" / slug(name)
                )
                for name, some in experts.items()
            }
        )
    rows = {
        BASE: Row(found.score, found.train_macs, 0.0, tdc.base.macs, tdc.base.num_params, None),
        TDC: row_of_run(tdc, Losses(found.mean, found.groups)),
    }
    for name, (results, before) in runs.items():
        rows[name] = row_of_run(results, losses[name], before)
    for name, one in networks.items():
        score = scores[slug(name)][0]
        costs = (one.train_macs, one.search_macs, float(one.macs), float(one.num_params))
        rows[name] = Row(score, *costs, losses[name])
    return metric, tdc, {name: rows[name] for name in ROWS if name in rows}


def loss_text(losses: Sequence[Losses | None]) -> str:
    """Write how far the losses are from the base's, and what their intervals say, seed by seed."""
    known = [one.mean for one in losses if one is not None]
    if not known:
        return "0"
    shares = [100 * loss.difference / loss.loss_base for loss in known]
    return f"{mean_and_spread(shares, 2)} % ({', '.join(map(verdict, known))})"


def write(
    flags: EqualFlags,
    folder: Path,
    metric: str,
    found: Found,
) -> None:
    """Write table, plot and record of the seeds that are done."""
    table, lines = [], {}
    names = [name for name in ROWS if name in {BASE, TDC, *flags.rows}]
    for budget, seeds in found.items():
        for name in names:
            rows = [rows[name] for _, rows in seeds.values()]
            table.append(
                [
                    name if len(found) == 1 else f"{name}, {budget:g}",
                    mean_and_spread([row.score for row in rows]),
                    loss_text([row.losses for row in rows]),
                    f"{fmean(row.train_macs for row in rows):.3g}",
                    f"{fmean(row.search_macs for row in rows):.2g}",
                    f"{fmean(row.macs for row in rows) / 1e6:.2f} M",
                    f"{fmean(row.num_params for row in rows) / 1e6:.2f} M",
                ]
            )
    columns = ["row", metric, "loss / base trained on's", "train macs", "search macs"]
    done = ", ".join(map(str, next(iter(found.values()))))
    note = (
        f"Seeds {done}. The loss is over all timesteps, on held-out images and noise that no "
        "choice has seen, as a difference from that of the base trained on; in brackets what the "
        "95 % interval of each seed says."
    )
    write_table(folder, "equal_compute", [*columns, "FLOPs (MACs)", "params"], table, note)
    for name in names:
        points = [
            (
                fmean(
                    rows[name].train_macs + rows[name].search_macs for _, rows in seeds.values()
                ),
                [rows[name].score for _, rows in seeds.values()],
            )
            for seeds in found.values()
        ]
        # The smaller network does not begin with the base.
        lines[name] = points if name == SMALLER else [start_of(found), *points]
    plot_lines(folder, "equal_compute", lines, xlabel="macs, search included", ylabel=metric)
    record = {
        f"{budget:g}": {
            str(seed): {
                "base": asdict(tdc.base),
                "rows": {name: asdict(row) for name, row in rows.items()},
                "comparison": asdict(tdc)["comparison"],
            }
            for seed, (tdc, rows) in seeds.items()
        }
        for budget, seeds in found.items()
    }
    commits = commits_of(folder) | {
        tdc.commit for seeds in found.values() for tdc, _ in seeds.values()
    }
    write_record(folder, "equal_compute", flags, commits, {"metric": metric, "budgets": record})


def start_of(
    found: Found,
) -> tuple[float, list[float]]:
    """Return the base's point, from which the lines start."""
    bases = [tdc.base for tdc, _ in next(iter(found.values())).values()]
    return fmean(base.train_macs for base in bases), [base.score for base in bases]


def main(flags: EqualFlags) -> None:
    """Run all seeds; write what is there after each of them."""
    steps = "" if flags.base_steps is None else f"-base-{flags.base_steps}"
    size = None if flags.image_size is None else f"{flags.image_size}px"
    share = None if flags.mean_macs_share is None else f"{flags.mean_macs_share:g}"
    chosen = size, flags.network_name, flags.method, flags.schedule, share, flags.allocation
    parts = [flags.preset, *filter(None, chosen)]
    held_out = "-held-out" if flags.held_out_of_base else ""
    folder = flags.storage / f"equal_compute-{'-'.join(parts)}{steps}{held_out}"
    found: dict[float, dict[int, tuple[Results, dict[str, Row]]]] = {}
    with connected(local_cpus(flags.config(flags.seeds[0]).compute)):  # one Ray for all
        for seed in flags.seeds:
            for budget in flags.budgets:
                config = flags.config(seed)
                num_steps = round(budget * config.finetune.num_steps)
                config = replace(config, finetune=replace(config.finetune, num_steps=num_steps))
                root = folder / f"seed-{seed}" / f"budget-{budget:g}"
                metric, tdc, rows = rows_of(flags, config, root)
                found.setdefault(budget, {})[seed] = (tdc, rows)
            write(flags, folder, metric, found)


if __name__ == "__main__":
    main(parse_flags(__doc__, EqualFlags))

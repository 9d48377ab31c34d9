"""Figures 3 and 7: is it worth while to train a base first, and to divide the timesteps at all?

    python experiments/two_stage.py --preset digits
    python experiments/two_stage.py --smoke

Three strategies with scores along the way: one model for all timesteps; an expert per group that
is trained from scratch on its group's timesteps, the paper's single stage; and both stages of TDC,
whose experts are pruned from a base and fine-tuned. The single stage's experts have the same
shapes that the proxy found for those of both stages. All strategies have as many training macs as
both stages together, search included, and every point names its macs; a model resumes from one
point to the next.

Hardware and hours: `digits` with two seeds, a quarter of the preset's steps and images
(`--steps-share` 0.25), takes about 25 minutes on 2 CPU cores. `cifar10` takes some
3 x 450 k steps of up to 3 x 8.1 GMACs x 128 images a seed: weeks on one GPU (an estimate from
macs).

The paper shows curves alone, without numbers; its tables' points on CIFAR-10 (FID): one model 4.08
after 500 k steps, both stages 3.76 after 450 k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from common import Flags, base_of, claim, commits_of, parse_flags, workers
from output import mean_and_spread, paper_column, plot_lines, write_record, write_table
from stages import Model, all_timesteps, from_nothing, scores_of, untrained_like

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import Plan, plan_groups
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.models.unet2d.unet import unet_config
from tdc_ray.models.units import KeptIndices, keep_everything, widths_of
from tdc_ray.pruning.group import GroupSearch, group_searches
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.result import SearchResult
from tdc_ray.pruning.search import search_submodel
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.collect_results import mean_over_sampling_steps
from tdc_ray.runs.pipelines import save_index
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.runs.stages.finetune import FinetuneResult, finetune_item
from tdc_ray.storage.files import read_json
from tdc_ray.storage.run_dir import RunDir

SHARES = (0.25, 0.5, 1.0)
"""Points along the way, as shares of the whole training of what is trained from there on."""

STRATEGIES = ("one model", "single stage", "both stages")
PAPER = {"cifar10": {"one model, 1": "4.08", "both stages, 1": "3.76"}}


@dataclass(frozen=True, slots=True)
class Point:
    """A strategy at one of its points."""

    model: Model
    train_macs: float
    """Spent until then, search included."""
    train_steps: int
    """Optimizer steps until then, of all models together."""


def trained_along(
    task: GroupSearch, kept: KeptIndices, config: RunConfig, points: Sequence[Path]
) -> Chain[list[FinetuneResult]]:
    """Train one sub-model from its start, and save it at every point."""
    # Each point resumes from the one before, whose learning rate may not have fallen.
    whole, results = replace(config.finetune, lr_schedule="constant"), []
    checkpoint = None
    for share, root in zip(SHARES, points, strict=True):
        train = replace(whole, num_steps=round(share * whole.num_steps))
        context = replace(task.context, run_dir=RunDir(root, task.context.run_dir.base_unet))
        item = finetune_item(replace(task, context=context), kept, train, config.compute)
        checkpoint = checkpoint or item.job.checkpoint
        moved = replace(item, job=replace(item.job, checkpoint=checkpoint))
        results.append((yield from result_of(moved)))
    return results


def points_of(
    pool: Pool,
    tasks: Sequence[GroupSearch],
    kept: Sequence[KeptIndices],
    config: RunConfig,
    plan: Plan | None,
    root: Path,
) -> list[Point]:
    """Train a strategy's sub-models side by side; make a pipeline of them at every point."""
    roots = [root / f"point-{share:g}" for share in SHARES]
    chains = {
        task.name: trained_along(task, choice, config, roots)
        for task, choice in zip(tasks, kept, strict=True)
    }
    done = pool.run(chains)
    found = []
    for place, point in enumerate(roots):
        results = [done[task.name][place] for task in tasks]
        run_dir, groups = RunDir(point), [task.group for task in tasks]
        save_index(run_dir, config, groups)
        macs = [result.macs for result in results]
        found.append(
            Point(
                Model(
                    "tdc",
                    run_dir.experts,
                    macs[0] if plan is None else mean_over_sampling_steps(plan, macs),
                ),
                sum(result.train_macs for result in results),
                sum(result.train_steps for result in results),
            )
        )
    return found


def one_seed(config: RunConfig, base: Path, folder: Path, pool: Pool) -> dict[str, list[Point]]:
    """Return every strategy's points."""
    claim(folder, config)
    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    space = space_of(unet_config(base), config.prune.space)
    run_dir = RunDir(folder / "search", base)
    tasks, memory = (
        group_searches(pruning_context(run_dir, config), space, plan.groups),
        MemoryBank(run_dir.memory),
    )
    choices: dict[str, SearchResult] = pool.run(
        {t.name: search_submodel(t, memory) for t in tasks}
    )
    kept = [choices[task.name].kept for task in tasks]
    spent = sum(choice.cost.macs for choice in choices.values())
    stage_1 = read_json(base.parent / "result.json")
    after = points_of(pool, tasks, kept, config, plan, folder / "both-stages")
    both = [
        Point(
            point.model,
            point.train_macs + stage_1["train_macs"] + spent,
            point.train_steps + stage_1["train_steps"],
        )
        for point in after
    ]
    budget = both[-1].train_macs

    start = untrained_like(base, folder / "untrained" / "unet", config.seed)
    macs = sum(space.macs(widths_of(choice)) for choice in kept)
    steps = round(budget / (3.0 * macs * config.base.batch_size))
    alone = from_nothing(config, steps)
    context = pruning_context(RunDir(folder / "single-stage", start), alone)
    lone = group_searches(context, space, plan.groups)
    single = points_of(pool, lone, kept, alone, plan, folder / "single-stage")

    steps = round(budget / (3.0 * space.macs_base * config.base.batch_size))
    longer, full = from_nothing(config, steps), keep_everything(space.units)
    whole = all_timesteps(longer, start, folder / "one-model", 1.0)
    one = points_of(pool, [whole], [full], longer, None, folder / "one-model")
    return dict(zip(STRATEGIES, (one, single, both), strict=True))


@dataclass(frozen=True, kw_only=True)
class StagesFlags(Flags):
    """Flags of this experiment."""

    seeds: tuple[int, ...] = (0, 1)
    """Training seeds."""
    steps_share: float = 0.25


def main(flags: StagesFlags) -> None:
    """Run all seeds, write the table and draw the curves."""
    folder = flags.storage / f"two_stage-{flags.preset}"
    rows: dict[str, list[tuple[float, float, int]]] = {}
    metric = ""
    for seed in flags.seeds:
        config = flags.config(seed)
        base = base_of(flags, seed)
        with workers(config, folder, flags.store) as pool:
            root = (folder / f"seed-{seed}").resolve()
            found = named(one_seed(config, base, root, pool))
            models = {name: point.model for name, point in found.items()}
            metric, scores = scores_of(
                pool, config, root / "scores", models, [config.evaluate.seed]
            )
        for name, point in found.items():
            row = (scores[name][0], point.train_macs, point.train_steps)
            rows.setdefault(name, []).append(row)
    paper = paper_column(PAPER, flags.preset)
    table = []
    for name, values in rows.items():
        of_seeds, macs, steps = zip(*values, strict=True)
        table.append(
            [
                name,
                mean_and_spread(of_seeds),
                paper.get(name, "-"),
                f"{fmean(macs):.3g}",
                f"{fmean(steps):.0f}",
            ]
        )
    columns = ["strategy, share", metric, paper[""], "train macs (search included)", "train steps"]
    write_table(folder, "two_stage", columns, table)
    lines = {
        strategy: [
            (fmean(macs), scores)
            for share in SHARES
            for scores, macs, _ in [zip(*rows[f"{strategy}, {share:g}"], strict=True)]
        ]
        for strategy in STRATEGIES
    }
    plot_lines(folder, "two_stage", lines, xlabel="train macs", ylabel=metric)
    record = {"metric": metric, "rows": rows}
    write_record(folder, "two_stage", flags, commits_of(folder), record)


def named(points: Mapping[str, Sequence[Point]]) -> dict[str, Point]:
    """Return the points by strategy and share."""
    return {
        f"{strategy}, {share:g}": point
        for strategy, along in points.items()
        for share, point in zip(SHARES, along, strict=True)
    }


if __name__ == "__main__":
    main(parse_flags(__doc__, StagesFlags))

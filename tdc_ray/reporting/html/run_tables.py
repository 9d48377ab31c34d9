"""The report's tables of one run."""

import statistics

import numpy as np

from tdc_ray.diffusion.plan import Plan
from tdc_ray.reporting.html.blocks import Column, Table, Value
from tdc_ray.reporting.html.load import RunData
from tdc_ray.reporting.html.paper_columns import (
    DATASETS,
    NO_PRUNING,
    TABLE_1,
    TABLE_4,
    is_of_the_paper,
    paper_dataset,
)
from tdc_ray.reporting.paper import PaperRow
from tdc_ray.runs.results import ModelResult, Results
from tdc_ray.runs.status import RunStatus

_OTHER_DATA = (
    "The paper has no such dataset: its columns are of {dataset}, so only the order of the rows "
    "can be compared, not the size of the numbers."
)


def models_table(results: Results) -> Table:
    """Hold base and TDC beside the paper's rows of Table I."""
    dataset = paper_dataset(results.preset)
    paper = TABLE_1[dataset]
    label = NO_PRUNING if results.prune.method == "none" else "TDC"
    ours = {"base": results.base, label: results.tdc}
    rows = [
        (name, *_beside(ours.get(name), row), DATASETS[dataset]) for name, row in paper.items()
    ]
    note = "The paper's TDC rows are for k = 0.5 and N = 10."
    if not is_of_the_paper(results.preset):
        note += " " + _OTHER_DATA.format(dataset=DATASETS[dataset])
    return Table(
        name="models",
        title="Base and TDC, beside the paper's Table I",
        columns=(
            Column("model"),
            Column(results.metric, "score"),
            Column("the paper's FID", "number"),
            Column("FLOPs (MACs)", "macs"),
            Column("the paper's FLOPs (MACs)", "macs"),
            Column("params", "millions"),
            Column("the paper's params", "millions"),
            Column("train steps", "count"),
            Column("the paper's train steps", "count"),
            Column("train macs", "power"),
            Column("images/s", "decimal"),
            Column("the paper's data"),
        ),
        rows=rows,
        note=note,
    )


def plan_table(plan: Plan) -> Table:
    """Give a row to each group of the plan."""
    return Table(
        name="plan",
        title="The groups and their limits",
        columns=(
            Column("group", "number"),
            Column("timesteps"),
            Column("size", "count"),
            Column("SNR from (dB)", "decimal"),
            Column("SNR to (dB)", "decimal"),
            Column("limit / F", "share"),
            Column("sampling steps", "count"),
        ),
        rows=[
            (
                group.index,
                _span(group.first, group.last),
                len(group.timesteps),
                group.snr_db_first,
                group.snr_db_last,
                group.limit_share,
                group.num_sampling_steps,
            )
            for group in plan.groups
        ],
        note=f"Mean limit over the {len(plan.sampling_timesteps)} sampling steps: "
        f"{plan.mean_limit_share:.4g} F.",
    )


def groups_table(results: Results) -> Table:
    """Give the experts with their losses."""
    is_time = results.prune.objective == "latency"
    return Table(
        name="groups",
        title="Losses of each group on held-out noise",
        columns=(
            Column("group", "number"),
            Column("timesteps"),
            Column("limit in ms", "number") if is_time else Column("macs limit", "macs"),
            Column("macs", "macs"),
            Column("params", "millions"),
            Column("base", "loss"),
            Column("cut", "loss"),
            Column("refit", "loss"),
            Column("fine-tuned", "loss"),
            Column("fine-tuned / base", "share"),
            Column("proposed by"),
        ),
        rows=[
            (
                group.index,
                _span(*group.timesteps),
                group.milliseconds_limit if is_time else group.macs_limit,
                group.macs,
                group.num_params,
                group.loss_base,
                group.loss_cut,
                group.loss_refit,
                group.loss_finetuned,
                group.loss_finetuned / group.loss_base if group.loss_base else None,
                group.source,
            )
            for group in results.groups
        ],
    )


def widths_table(results: Results) -> Table:
    """Give the widths that are left of every unit (row) in every group (column)."""
    units = dict.fromkeys(unit for group in results.groups for unit in group.widths)
    return Table(
        name="widths",
        title="Widths that are left",
        columns=(
            Column("unit"),
            *(Column(f"group {group.index}", "number") for group in results.groups),
        ),
        rows=[(unit, *(group.widths.get(unit) for group in results.groups)) for unit in units],
        heat=True,
        note="GroupNorm groups of a residual block, heads of an attention. The colour is the "
        "share of the widest that any group keeps.",
    )


def rounds_table(run: RunData) -> Table:
    """Give what the candidates of each group's rounds came to."""
    rows: list[tuple[Value, ...]] = []
    by_round: dict[tuple[int, int], list[float]] = {}
    for entry in run.memory:
        by_round.setdefault((entry.group, entry.round), []).append(entry.loss)
    for (group, number), losses in sorted(by_round.items()):
        finite = [loss for loss in losses if np.isfinite(loss)]
        mean = statistics.fmean(finite) if finite else None
        spread = statistics.stdev(finite) if len(finite) > 1 else None
        best = min(finite, default=None)
        rows.append((group, number + 1, len(losses), mean, spread, best))
    return Table(
        name="rounds",
        title="Losses of the candidates, round by round",
        columns=(
            Column("group", "number"),
            Column("round", "number"),
            Column("candidates", "count"),
            Column("mean loss", "loss"),
            Column("deviation", "loss"),
            Column("best", "loss"),
        ),
        rows=rows,
    )


def time_table(results: Results) -> Table:
    """Give what each stage took, beside the paper's Table IV."""
    seconds, prune = results.seconds, results.prune
    experts = results.tdc.train_macs - results.base.train_macs
    rows: list[tuple[Value, ...]] = [
        ("base", seconds.base, results.base.train_macs, None),
        ("pruning: search", seconds.prune, prune.search_macs, None),
        ("pruning: proposals", prune.proxy_seconds, None, TABLE_4["prune"]),
        ("fine-tunes", seconds.finetune, experts, TABLE_4["finetune"]),
        ("evaluation", seconds.evaluate, None, None),
        ("wall, last attempt", seconds.wall, None, TABLE_4["all"]),
    ]
    tokens = ""
    if prune.prompt_tokens or prune.completion_tokens:
        sent, got = prune.prompt_tokens, prune.completion_tokens
        tokens = f" {sent:,} tokens of prompts, {got:,} of replies."
    return Table(
        name="time",
        title="Time and macs of each stage",
        columns=(
            Column("stage"),
            Column("time", "seconds"),
            Column("macs", "power"),
            Column("the paper's (Table IV, CIFAR-10)", "seconds"),
        ),
        rows=rows,
        note="Times are summed over the workers, but for wall. The paper's first is of GPT-4's "
        f"answers.{tokens}",
    )


def workers_table(run: RunData) -> Table:
    """Say how well the workers were used."""
    found = run.usage if run.results is None or not run.results.workers else run.results.workers
    return Table(
        name="workers",
        title="How well the workers were used",
        columns=(
            Column("phase"),
            Column("workers", "count"),
            Column("makespan", "seconds"),
            Column("least possible", "seconds"),
            Column("work", "seconds"),
            Column("lost", "seconds"),
            Column("used", "share"),
        ),
        rows=[
            (
                part.phase or "start",
                part.num_workers,
                part.makespan_seconds,
                part.lower_bound_seconds,
                part.work_seconds,
                part.lost_seconds,
                part.utilisation,
            )
            for part in found
            if part.num_workers
        ],
    )


def progress_table(progress: RunStatus) -> Table:
    """Say how far the groups of a run are that is not finished."""
    return Table(
        name="progress",
        title="How far it is",
        columns=(
            Column("group", "number"),
            Column("timesteps"),
            Column("candidates", "count"),
            Column("best loss", "loss"),
            Column("fine-tuned", "loss"),
            Column("state"),
        ),
        rows=[
            (
                group.index,
                _span(*group.timesteps),
                group.num_candidates,
                group.best_loss,
                group.loss_finetuned,
                "done"
                if group.loss_finetuned is not None
                else "not finished"
                if group.failed is None
                else f"failed: {group.failed}",
            )
            for group in progress.groups
        ],
    )


def _beside(ours: ModelResult | None, paper: PaperRow) -> tuple[Value, ...]:
    """Give a row of numbers, each of ours before the paper's; some of ours have none beside."""
    theirs = (paper.fid, paper.macs, paper.num_params, paper.train_steps)
    mine: tuple[Value, ...] = (None,) * 6
    if ours is not None:
        mine = (ours.score, ours.macs, ours.num_params, ours.train_steps)
        mine += (ours.train_macs, ours.images_per_second)
    pairs = zip(mine[:4], theirs, strict=True)
    return (*(value for pair in pairs for value in pair), *mine[4:])


def _span(first: int, last: int) -> str:
    return f"{first}-{last}"

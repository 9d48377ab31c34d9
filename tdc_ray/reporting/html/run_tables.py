"""The report's tables of one run."""

import statistics
from collections.abc import Callable

import numpy as np

from tdc_ray.diffusion.plan import Plan
from tdc_ray.reporting.html.blocks import Column, Kind, Table, Value, table_of
from tdc_ray.reporting.html.load import RunData
from tdc_ray.reporting.models import LONGER_BASE, ModelRow, model_rows
from tdc_ray.reporting.paper import (
    DATASETS,
    TABLE_1,
    TABLE_4,
    PaperRow,
    is_of_the_paper,
    paper_dataset,
)
from tdc_ray.reporting.text import percent_text, seen_text, timesteps_text, verdict
from tdc_ray.runs.results import (
    HELD_OUT_LOSS,
    ComparisonResult,
    GroupResult,
    LossDifference,
    Results,
)
from tdc_ray.runs.status import GroupStatus, RunStatus


def models_table(results: Results) -> Table:
    """Return base and TDC beside the paper's rows of Table I."""
    dataset = DATASETS[paper_dataset(results.preset)]
    paper = TABLE_1[paper_dataset(results.preset)]
    ours = {row.label: row for row in model_rows(results)}
    labels = [label for label in ("base", LONGER_BASE, *paper) if label in {**paper, **ours}]

    def of(value: Callable[[ModelRow], Value]) -> Callable[[str], Value]:
        return lambda label: value(ours[label]) if label in ours else None

    def theirs(value: Callable[[PaperRow], Value]) -> Callable[[str], Value]:
        return lambda label: value(paper[label]) if label in paper else None

    def other(name: str) -> tuple[str, Kind, Callable[[str], Value]]:
        return name, "loss", of(lambda model: model.metrics.get(name))

    others = [other(name) for name in results.tdc.metrics]
    fid: list[tuple[str, Kind, Callable[[str], Value]]] = []
    if results.metric != HELD_OUT_LOSS:  # which is no distance between images
        fid = [("the paper's FID", "number", theirs(lambda row: row.fid))]
    note = "The paper's TDC rows are for k = 0.5 and N = 10."
    if not is_of_the_paper(results.preset):
        note += (
            f" The paper has no such dataset: its columns are of {dataset}, so only the order of "
            "the rows can be compared, not the size of the numbers."
        )
    return table_of(
        "models",
        "Base and TDC, beside the paper's Table I",
        dict.fromkeys(labels),
        [
            ("model", "text", lambda label: label),
            (results.metric, "score", of(lambda model: model.score)),
            *fid,
            *others,
            ("FLOPs (MACs)", "macs", of(lambda model: model.macs)),
            ("the paper's FLOPs (MACs)", "macs", theirs(lambda row: row.macs)),
            ("params", "millions", of(lambda model: model.num_params)),
            ("the paper's params", "millions", theirs(lambda row: row.num_params)),
            ("train steps", "count", of(lambda model: model.train_steps)),
            ("the paper's train steps", "count", theirs(lambda row: row.train_steps)),
            ("train macs", "power", of(lambda model: model.train_macs)),
            ("search macs", "power", of(lambda model: model.search_macs)),
            ("images/s", "decimal", of(lambda model: model.images_per_second)),
            ("the paper's data", "text", lambda label: dataset if label in paper else None),
        ],
        note=note,
    )


def comparison_table(results: Results, comparison: ComparisonResult) -> Table:
    """Return the losses of TDC beside those of the base trained on, group by group."""
    timesteps = {group.index: timesteps_text(group.timesteps) for group in results.groups}
    rows: list[tuple[str, str, LossDifference]] = [
        (str(group.index), timesteps[group.index], group) for group in comparison.groups
    ]
    rows.append(("all", "all, alike", comparison.mean))
    repeats = comparison.num_noised // comparison.num_images
    return table_of(
        "comparison",
        f"Losses of TDC and of the {LONGER_BASE}, on the same images and noise",
        rows,
        [
            ("group", "text", lambda row: row[0]),
            ("timesteps", "text", lambda row: row[1]),
            ("TDC", "loss", lambda row: row[2].loss_tdc),
            (LONGER_BASE, "loss", lambda row: row[2].loss_base),
            ("difference", "loss", lambda row: row[2].difference),
            ("from", "loss", lambda row: row[2].low),
            ("to", "loss", lambda row: row[2].high),
            ("in %", "text", lambda row: percent_text(row[2], row[2].difference)),
            ("TDC is", "text", lambda row: verdict(row[2])),
        ],
        note=f"{comparison.num_images} held-out images that no fine-tune and no choice of the "
        f"search has seen, each noised {repeats} times in every group; the difference is TDC's "
        "minus the base's, with its 95 % interval, paired by image. " + seen_text(comparison),
    )


def swap_table(results: Results, comparison: ComparisonResult) -> Table:
    """Return the scores of the base trained on with one group's expert put in."""
    timesteps = {group.index: timesteps_text(group.timesteps) for group in results.groups}
    rows: list[tuple[str, str, float]] = [
        (str(swap.index), timesteps[swap.index], swap.score) for swap in comparison.swaps
    ]
    rows = [("none", "", comparison.score), *rows, ("all: TDC", "", results.tdc.score)]
    return table_of(
        "swaps",
        f"The {LONGER_BASE} with one group's expert put in",
        rows,
        [
            ("expert of group", "text", lambda row: row[0]),
            ("timesteps", "text", lambda row: row[1]),
            (results.metric, "score", lambda row: row[2]),
            ("difference", "score", lambda row: row[2] - comparison.score),
        ],
        note="Lower is better: a group whose row is below the first gains by its expert.",
    )


def plan_table(plan: Plan) -> Table:
    """Return a row for each group of the plan."""
    return table_of(
        "plan",
        "The groups and their limits",
        plan.groups,
        [
            ("group", "number", lambda group: group.index),
            ("timesteps", "text", lambda group: f"{group.first}-{group.last}"),
            ("size", "count", lambda group: len(group.timesteps)),
            ("SNR from (dB)", "decimal", lambda group: group.snr_db_first),
            ("SNR to (dB)", "decimal", lambda group: group.snr_db_last),
            ("limit / F", "share", lambda group: group.limit_share),
            ("sampling steps", "count", lambda group: group.num_sampling_steps),
        ],
        note=f"Mean limit over the {len(plan.sampling_timesteps)} sampling steps: "
        f"{plan.mean_limit_share:.4g} F.",
    )


def groups_table(results: Results) -> Table:
    """Return the experts with their losses."""
    is_time = results.prune.objective == "latency"

    def relative(group: GroupResult) -> float | None:
        return group.loss_finetuned / group.loss_base if group.loss_base else None

    return table_of(
        "groups",
        "Losses of each group on held-out noise",
        results.groups,
        [
            ("group", "number", lambda group: group.index),
            ("timesteps", "text", lambda group: timesteps_text(group.timesteps)),
            (
                "limit in ms" if is_time else "macs limit",
                "number" if is_time else "macs",
                lambda group: group.milliseconds_limit if is_time else group.macs_limit,
            ),
            ("macs", "macs", lambda group: group.macs),
            ("params", "millions", lambda group: group.num_params),
            ("train steps", "count", lambda group: group.train_steps),
            ("base", "loss", lambda group: group.loss_base),
            ("cut", "loss", lambda group: group.loss_cut),
            ("refit", "loss", lambda group: group.loss_refit),
            ("fine-tuned", "loss", lambda group: group.loss_finetuned),
            ("fine-tuned / base", "share", relative),
            ("proposed by", "text", lambda group: group.source),
        ],
    )


def widths_table(results: Results) -> Table:
    """Return the widths that every group (column) keeps of every unit (row)."""
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
        note="GroupNorm groups of a residual block, heads of an attention, channels of a "
        "feed-forward. The colour is the share of the widest that any group keeps.",
    )


def rounds_table(run: RunData) -> Table:
    """Return the losses of the candidates of each group's rounds."""
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
    """Return the time of each stage, beside the paper's Table IV."""
    seconds, prune = results.seconds, results.prune
    experts = results.tdc.train_macs - results.base.train_macs
    drawing = prune.drawing_macs
    rows: list[tuple[Value, ...]] = [
        ("base", seconds.base, results.base.train_macs, None),
        ("pruning: search", seconds.prune, prune.search_macs, None),
        *([("of it: images of the base", None, drawing, None)] if drawing else []),
        ("pruning: proposals", prune.proxy_seconds, None, TABLE_4["prune"]),
        ("fine-tunes", seconds.finetune, experts, TABLE_4["finetune"]),
        ("evaluation", seconds.evaluate, None, None),
        ("wall, last attempt", seconds.wall, None, TABLE_4["all"]),
    ]
    if (comparison := results.comparison) is not None:
        added = comparison.train_macs - results.base.train_macs
        rows.insert(-1, (f"{LONGER_BASE}, beyond stage 1", comparison.seconds, added, None))
    tokens = ""
    if prune.prompt_tokens or prune.completion_tokens:
        sent, got = prune.prompt_tokens, prune.completion_tokens
        price = f", at a price of {prune.proxy_cost:.4g}" if prune.proxy_cost else ""
        tokens = f" {sent:,} tokens of prompts, {got:,} of replies{price}."
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
    """Return the utilisation of the workers."""
    usage = run.usage if run.results is None or not run.results.workers else run.results.workers
    return table_of(
        "workers",
        "How well the workers were used",
        [part for part in usage if part.num_workers],
        [
            ("phase", "text", lambda part: part.phase or "start"),
            ("workers", "count", lambda part: part.num_workers),
            ("makespan", "seconds", lambda part: part.makespan_seconds),
            ("least possible", "seconds", lambda part: part.lower_bound_seconds),
            ("work", "seconds", lambda part: part.work_seconds),
            ("lost", "seconds", lambda part: part.lost_seconds),
            ("used", "share", lambda part: part.utilisation),
        ],
    )


def progress_table(progress: RunStatus) -> Table:
    """Return the progress of the groups of an unfinished run."""

    def state(group: GroupStatus) -> str:
        if group.loss_finetuned is not None:
            return "done"
        return "not finished" if group.failed is None else f"failed: {group.failed}"

    return table_of(
        "progress",
        "How far it is",
        progress.groups,
        [
            ("group", "number", lambda group: group.index),
            ("timesteps", "text", lambda group: timesteps_text(group.timesteps)),
            ("candidates", "count", lambda group: group.num_candidates),
            ("best loss", "loss", lambda group: group.best_loss),
            ("fine-tuned", "loss", lambda group: group.loss_finetuned),
            ("state", "text", state),
        ],
    )

"""The sections of one run, in their order."""

from collections.abc import Iterator

from tdc_ray.diffusion.plan import Plan
from tdc_ray.reporting.figures import (
    differences_of_groups,
    losses_of_groups,
    plan_over_snr,
    plan_over_timesteps,
    relative_rounds,
    rounds_of_groups,
    stages_of_time,
    timeline,
)
from tdc_ray.reporting.html.blocks import Block, BlockRow, KeyNumbers, Lines, Plot, Samples, Table
from tdc_ray.reporting.html.load import RunData
from tdc_ray.reporting.html.run_tables import (
    comparison_table,
    groups_table,
    models_table,
    plan_table,
    progress_table,
    rounds_table,
    swap_table,
    time_table,
    widths_table,
    workers_table,
)
from tdc_ray.reporting.html.samples import samples_block
from tdc_ray.reporting.html.scores import run_points, score_over_macs
from tdc_ray.reporting.html.time_tables import times_blocks
from tdc_ray.reporting.models import LONGER_BASE
from tdc_ray.reporting.text import conclusions, duration, macs_text, millions_text
from tdc_ray.runs.results import ComparisonResult, Results, ReuseResult, score_text
from tdc_ray.runs.status import RunStatus

MAX_NARROW = 6
"""Most columns of a heat map that has room beside a plot."""

MAX_SPANS = 1500
"""Most attempts at items that a timeline is drawn of: a page must open at once."""


def run_parts(run: RunData, key: str) -> Iterator[tuple[str, str, list[Block]]]:
    """Yield key, title and blocks of each part of a run's report; the first is a summary."""
    results = run.results
    if results is None:
        yield "progress", "How far it is", _progress(run.progress) if run.progress else []
        if run.samples:
            yield "samples", "Samples", [*_samples(run)]
    else:
        yield "summary", "At a glance", _summary(results)
        figures = score_over_macs(run_points({run.name: results}), key, over_training=False)
        shown: list[Plot | Samples] = [*figures, *_samples(run)]
        yield "scores", "Scores and samples", [BlockRow(shown), models_table(results)]
    if results is not None and (comparison := results.comparison) is not None:
        yield "comparison", "At equal macs", _comparison(results, comparison, key)
    if run.plan is not None:
        yield "plan", "Plan", _plan(run.plan, results, key)
    if results is not None and results.groups:
        plot = Plot(
            svg=losses_of_groups(results, f"{key}-losses"),
            title="Losses before and after",
            caption="Loss on held-out noise of the group's timesteps, over the base's there.",
        )
        widths, groups = widths_table(results), groups_table(results)
        is_narrow = len(widths.columns) <= MAX_NARROW
        blocks: list[Block] = [BlockRow([plot, widths])] if is_narrow else [plot, widths]
        yield "groups", "Groups", [*blocks, groups]
    if results is not None and (times := times_blocks(results, key)):
        yield "times", "Macs and time", times
    if run.memory:
        yield "rounds", "Rounds", _rounds(run, key)
    if cost := _cost(run, key):
        yield "cost", "Cost and time", cost


def _samples(run: RunData) -> list[Samples]:
    return [samples_block(run.samples, run.real)] if run.samples else []


def _comparison(results: Results, comparison: ComparisonResult, key: str) -> list[Block]:
    plot = Plot(
        svg=differences_of_groups(comparison, f"{key}-differences"),
        title="TDC's loss less the other's",
        caption=f"In percent of the {LONGER_BASE}'s, with 95 % intervals: below 0 TDC is better.",
    )
    blocks: list[Block] = [BlockRow([plot, comparison_table(results, comparison)])]
    return [*blocks, swap_table(results, comparison)] if comparison.swaps else blocks


def _progress(progress: RunStatus) -> list[Block]:
    tuned = sum(group.loss_finetuned is not None for group in progress.groups)
    lines = [
        "This run is not finished, and is shown as far as it is; the command that began it goes "
        "on.",
        f"Stage 1: {progress.base}.",
        f"Stage 2: {tuned} of {len(progress.groups)} experts are fine-tuned.",
        *(f"Under way: {span.item}." for span in progress.running[:8]),
    ]
    return [Lines(lines, is_warning=True), progress_table(progress)]


def _summary(results: Results) -> list[Block]:
    base, tdc, seconds = results.base, results.tdc, results.seconds
    spent = tdc.train_macs + results.prune.search_macs
    trained = "the base was given"
    if results.given_base is None and base.train_macs:
        trained = (
            f"{tdc.train_macs / base.train_macs:.2f} times the base's, with the search "
            f"{spent / base.train_macs:.2f} times"
        )
    against = f"base {score_text(base.score)}; lower is better"
    if results.comparison is not None:
        against = f"{LONGER_BASE} {score_text(results.comparison.score)}, {against}"
    tiles = KeyNumbers(
        [
            (results.metric, score_text(tdc.score), against),
            (
                "macs of a step",
                macs_text(tdc.macs),
                f"{tdc.macs / base.macs:.1%} of {macs_text(base.macs)}",
            ),
            (
                "params at work",
                millions_text(tdc.num_params),
                f"{tdc.num_params / base.num_params:.1%} of {millions_text(base.num_params)}",
            ),
            (
                "train and search macs",
                f"{tdc.train_macs:.2e} + {results.prune.search_macs:.2e}",
                trained,
            ),
            ("wall", duration(seconds.wall), "of the attempt that finished it"),
        ]
    )
    plan = results.plan
    made = [
        f"{results.preset}, seed {results.seed}, {results.dataset}: {plan.schedule} schedule, "
        f"k = {plan.k:g}, N = {plan.num_groups}; pruned by {results.prune.method}, "
        f"refit {results.prune.refit}; commit {(results.commit or 'unknown')[:12]}."
    ]
    return [tiles, Lines(conclusions(results)), Lines(made)]


def _plan(plan: Plan, results: Results | None, key: str) -> list[Block]:
    is_time = results is not None and results.prune.objective == "latency"
    what = "time, in macs' place," if is_time else "macs"
    plots = [
        Plot(
            svg=plan_over_snr(plan, results, f"{key}-plan-snr"),
            title="Limits over the signal-to-noise ratio",
            caption=f"What each group may take of the base's {what} F, and what its expert takes.",
        ),
        Plot(
            svg=plan_over_timesteps(plan, f"{key}-plan"),
            title="Limits and SNR over the timesteps",
            caption="Groups are runs of timesteps of about the same difficulty.",
        ),
    ]
    blocks: list[Block] = [BlockRow(plots), plan_table(plan)]
    return [*blocks, Lines(plan.notes)] if plan.notes else blocks


def _rounds(run: RunData, key: str) -> list[Block]:
    table = rounds_table(run)
    if not relative_rounds(run.memory, run.results):
        return [table]
    plot = Plot(
        svg=rounds_of_groups(run.memory, run.results, f"{key}-rounds"),
        title="Losses over the rounds",
        caption="As the paper's Figure 5: mean (line) and standard deviation (band) over the "
        "candidates of a round, after the refit where there is one.",
    )
    return [BlockRow([plot, table])]


def _reused(reuse: ReuseResult) -> str:
    """Return how much of a run was reused from what others had computed."""
    computed = reuse.train_macs_computed + reuse.search_macs_computed
    taken = reuse.train_macs_reused + reuse.search_macs_reused
    return (
        f"Of its {computed + taken:.2e} macs of training and search, {computed:.2e} were computed "
        f"for this run; the rest had been for another one ({reuse.items_reused} of "
        f"{reuse.items_computed + reuse.items_reused} items)."
    )


def _cost(run: RunData, key: str) -> list[Block]:
    blocks: list[Block] = []
    if run.results is not None:
        plot = Plot(
            svg=stages_of_time(run.results.seconds, f"{key}-time"),
            title="Where the time went",
            caption="Summed over the workers; what was taken from a store, as first computed.",
        )
        blocks = [BlockRow([plot, time_table(run.results)])]
        if run.results.reuse is not None:
            blocks.append(Lines([_reused(run.results.reuse)]))
    workers: Table = workers_table(run)
    if workers.rows:
        blocks.append(workers)
    spans = sum(bool(span.workers) for span in run.history.spans)
    if 0 < spans <= MAX_SPANS:
        plot = Plot(
            svg=timeline(run.history, f"{key}-timeline"),
            title="Who ran what, when",
            caption="A row per worker; a new driver's workers begin anew.",
            is_wide=True,
        )
        blocks.append(plot)
    elif spans:
        blocks.append(Lines([f"{spans} attempts are too many to draw; timeline.png shows them."]))
    return blocks

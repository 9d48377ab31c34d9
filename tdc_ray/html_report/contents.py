"""What stands in a report, and in which order."""

import math
from collections.abc import Iterator, Mapping, Sequence

from tdc_ray.html_report.blocks import (
    Block,
    Lines,
    Plot,
    Report,
    Row,
    Samples,
    Section,
    Table,
    Tiles,
    duration,
)
from tdc_ray.html_report.figures import (
    Point,
    figure_1,
    losses_of_groups,
    plan_over_snr,
    plan_over_timesteps,
    relative_rounds,
    rounds_of_groups,
    stages_of_time,
    timeline,
)
from tdc_ray.html_report.gather import RunData, SweepData
from tdc_ray.html_report.overview import runs_table, settings_table, trials_table
from tdc_ray.html_report.pictures import samples_block
from tdc_ray.html_report.tables import (
    groups_table,
    models_table,
    plan_table,
    progress_table,
    rounds_table,
    time_table,
    widths_table,
    workers_table,
)
from tdc_ray.report import conclusions, macs_text, millions_text
from tdc_ray.results import Results

MAX_NARROW = 6
"""Most columns of a heat map that has room beside a plot."""

MAX_SPANS = 1500
"""Most attempts at items that a timeline is drawn of: a page must open at once."""


def report_of(
    runs: Sequence[RunData], sweeps: Sequence[tuple[SweepData, Sequence[RunData]]]
) -> Report:
    """Put a report together.

    Args:
        runs: Runs that were named.
        sweeps: Sweeps that were named, each with its trials that get sections of their own.
    """
    all_runs = [*runs, *(run for _, trials in sweeps for run in trials)]
    keys = {run.name: f"run-{number}" for number, run in enumerate(all_runs)}
    sections: list[Section] = []
    for number, (sweep, trials) in enumerate(sweeps):
        sections += _sweep(sweep, trials, keys, f"sweep-{number}")
    if len(runs) > 1:
        sections.append(_all_runs(runs, keys))
    is_alone = len(all_runs) == 1 and not sweeps
    for run in all_runs:
        sections += _run(run, keys[run.name], is_alone=is_alone)
    places = [sweep.path for sweep, _ in sweeps] + [run.path for run in runs]
    names = [f"sweep {sweep.name}" for sweep, _ in sweeps]
    if runs:
        names.append(
            f"{len(runs)} runs" if len(runs) > 1 else f"{runs[0].preset}, seed {runs[0].seed}"
        )
    return Report(
        title=f"TDC Training: {', '.join(names)}", subtitle=" · ".join(places), sections=sections
    )


def _all_runs(runs: Sequence[RunData], keys: Mapping[str, str]) -> Section:
    finished = {run.name: run.results for run in runs if run.results is not None}
    return Section(
        key="runs",
        title="All runs",
        blocks=[
            Row([*_figures_1(_scored(finished), "runs", over_training=True)]),
            runs_table(runs, keys),
        ],
    )


def _sweep(
    data: SweepData, trials: Sequence[RunData], keys: Mapping[str, str], key: str
) -> Iterator[Section]:
    sweep, own = data.sweep, {run.name for run in trials}
    done = [trial for trial in sweep.trials if trial.score is not None]
    others = len(sweep.trials) - len(done)
    best = min(done, key=lambda trial: trial.score or 0.0, default=None)
    tiles = [("trials", str(len(sweep.trials)), f"{len(done)} with a score, {others} without")]
    if best is not None:
        settings = ", ".join(f"{name} = {value}" for name, value in best.params.items())
        tiles.append(
            (f"best {best.metric or 'score'}", f"{best.score:.3f}", settings or best.name)
        )
    if sweep.pareto:
        tiles.append(("Pareto front", str(len(sweep.pareto)), ", ".join(sweep.pareto[:6])))
    blocks: list[Block] = [Tiles(tiles)]
    blocks.append(Row([*_figures_1(_tried(data), key, over_training=True)]))
    blocks.append(trials_table(data, {name: keys[name] for name in own}))
    if (settings_means := settings_table(data)) is not None:
        blocks.append(settings_means)
    if len(own) < len(data.results):
        blocks.append(
            Lines(
                [
                    f"Of {len(data.results)} finished trials {len(own)} have a section here, "
                    "those of the Pareto front and the best first; tdc-ray report on a trial's "
                    "directory shows any other."
                ]
            )
        )
    yield Section(key=key, title=f"Sweep {data.name}", blocks=blocks)


def _scored(found: Mapping[str, Results]) -> dict[str, list[Point]]:
    """Give bases and experts as points, by metric: other scores cannot be compared."""
    points: dict[str, list[Point]] = {}
    for name, results in found.items():
        base, tdc, searched = results.base, results.tdc, results.prune.search_macs
        trained = base.train_macs if results.given_base is None else None
        some = points.setdefault(results.metric, [])
        point = Point("base", base.score, base.macs, trained, is_base=True)
        if point not in some:
            some.append(point)
        label = name if len(found) > 1 else "TDC"
        spent = tdc.train_macs + searched
        some.append(Point(label, tdc.score, tdc.macs, spent, is_base=False))
    return points


def _tried(data: SweepData) -> dict[str, list[Point]]:
    """Give the trials of a sweep as points, with the bases that are known."""
    points = {
        metric: [point for point in some if point.is_base]
        for metric, some in _scored(data.results).items()
    }
    for trial in data.sweep.trials:
        if trial.score is None or trial.macs is None:
            continue
        spent = None if trial.train_macs is None else trial.train_macs + (trial.search_macs or 0.0)
        is_best = trial.name in data.sweep.pareto
        point = Point(trial.name, trial.score, trial.macs, spent, is_base=False, is_best=is_best)
        points.setdefault(trial.metric or "score", []).append(point)
    return points


def _figures_1(
    by_metric: Mapping[str, Sequence[Point]], key: str, *, over_training: bool
) -> Iterator[Plot]:
    """Draw scores against macs, and against those of training, for each metric."""
    for number, (metric, found) in enumerate(by_metric.items()):
        points = [p for p in found if math.isfinite(p.score) and math.isfinite(p.macs) and p.macs]
        known = [point for point in points if point.train_macs is not None]
        front = " Orange: the Pareto front." if any(p.is_best for p in points) else ""
        colours = f"Gray: bases; blue: TDC.{front}"
        if points:
            yield Plot(
                svg=figure_1(points, metric, f"{key}-figure-1-{number}"),
                title="Score against macs",
                caption="As the paper's Figure 1: a circle's area goes with the macs of a step. "
                f"{colours} Lower and further to the left is better.",
            )
        if over_training and known:
            yield Plot(
                svg=figure_1(known, metric, f"{key}-train-{number}", over_training=True),
                title="Score against what training took",
                caption=f"Base and experts, search included. {colours}",
            )


def _run(run: RunData, key: str, *, is_alone: bool) -> Iterator[Section]:
    """Give a run's sections: on its own its parts, else itself with its parts below it."""
    parts = list(_parts(run, key))
    if is_alone:
        yield from (
            Section(key=f"{key}-{name}", title=title, blocks=blocks, run=run.name)
            for name, title, blocks in parts
        )
        return
    yield Section(key=key, title=run.name, blocks=parts[0][2], run=run.name)
    for name, title, blocks in parts[1:]:
        yield Section(key=f"{key}-{name}", title=title, blocks=blocks, level=3, run=run.name)


def _parts(run: RunData, key: str) -> Iterator[tuple[str, str, list[Block]]]:
    """Give key, title and blocks of each part of a run's report; the first is a summary."""
    results = run.results
    if results is None:
        yield "progress", "How far it is", _progress(run)
        if run.samples:
            yield "samples", "Samples", [*_samples(run)]
    else:
        yield "summary", "At a glance", _summary(results)
        figures = _figures_1(_scored({run.name: results}), key, over_training=False)
        shown = [*figures, *_samples(run)]
        yield "scores", "Scores and samples", [Row(shown), models_table(results)]
    if run.plan is not None:
        yield "plan", "Plan", _plan(run, key)
    if results is not None and results.groups:
        plot = Plot(
            svg=losses_of_groups(results, f"{key}-losses"),
            title="Losses before and after",
            caption="Loss on held-out noise of the group's timesteps, over the base's there.",
        )
        widths, groups = widths_table(results), groups_table(results)
        is_narrow = len(widths.columns) <= MAX_NARROW
        blocks: list[Block] = [Row([plot, widths])] if is_narrow else [plot, widths]
        yield "groups", "Groups", [*blocks, groups]
    if run.memory:
        yield "rounds", "Rounds", _rounds(run, key)
    if cost := _cost(run, key):
        yield "cost", "Cost and time", cost


def _samples(run: RunData) -> list[Samples]:
    return [samples_block(run.samples)] if run.samples else []


def _progress(run: RunData) -> list[Block]:
    progress = run.progress
    assert progress is not None
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
        trained = f"{spent / base.train_macs:.2f} times the base's, search included"
    tiles = Tiles(
        [
            (results.metric, f"{tdc.score:.3f}", f"base {base.score:.3f}; lower is better"),
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
            ("train and search macs", f"{spent:.2e}", trained),
            ("wall", duration(seconds.wall), "of the attempt that finished it"),
        ]
    )
    plan = results.plan
    made = [
        f"{results.preset}, seed {results.seed}, {results.dataset}: {plan.schedule} schedule, "
        f"k = {plan.k:g}, N = {plan.num_groups}; pruned by {results.prune.method}, "
        f"refit {results.prune.refit}; commit {results.commit or 'unknown'}."
    ]
    return [tiles, Lines(conclusions(results)), Lines(made)]


def _plan(run: RunData, key: str) -> list[Block]:
    assert run.plan is not None
    plots = [
        Plot(
            svg=plan_over_snr(run.plan, run.results, f"{key}-plan-snr"),
            title="Limits over the signal-to-noise ratio",
            caption="What each group may take of the base's macs F, and what its expert takes.",
        ),
        Plot(
            svg=plan_over_timesteps(run.plan, f"{key}-plan"),
            title="Limits and SNR over the timesteps",
            caption="Groups are runs of timesteps of about the same difficulty.",
        ),
    ]
    blocks: list[Block] = [Row(plots), plan_table(run.plan)]
    return [*blocks, Lines(run.plan.notes)] if run.plan.notes else blocks


def _rounds(run: RunData, key: str) -> list[Block]:
    table = rounds_table(run)
    if not relative_rounds(run):
        return [table]
    plot = Plot(
        svg=rounds_of_groups(run, f"{key}-rounds"),
        title="Losses over the rounds",
        caption="As the paper's Figure 5: mean (line) and standard deviation (band) over the "
        "candidates of a round, after the refit where there is one.",
    )
    return [Row([plot, table])]


def _cost(run: RunData, key: str) -> list[Block]:
    blocks: list[Block] = []
    if run.results is not None:
        plot = Plot(
            svg=stages_of_time(run.results.seconds, f"{key}-time"),
            title="Where the time went",
            caption="Summed over the workers.",
        )
        blocks = [Row([plot, time_table(run.results)])]
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

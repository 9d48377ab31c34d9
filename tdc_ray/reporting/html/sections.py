"""The sections of a page, in their order."""

from collections.abc import Iterator, Mapping, Sequence

from tdc_ray.reporting.html.blocks import Block, BlockRow, KeyNumbers, Lines, Page, Section
from tdc_ray.reporting.html.comparison_tables import (
    runs_table,
    setting_text,
    settings_table,
    trials_table,
)
from tdc_ray.reporting.html.load import RunData, SweepData
from tdc_ray.reporting.html.run_sections import run_parts
from tdc_ray.reporting.html.scores import run_points, score_over_macs, trial_points
from tdc_ray.runs.results import score_text
from tdc_ray.runs.sweep.results import finished_settings

MAX_RUNS = 12
"""Most runs of several that get a section of their own."""


def page_of(
    runs: Sequence[RunData], sweeps: Sequence[tuple[SweepData, Mapping[str, RunData]]]
) -> Page:
    """Return the page on runs and sweeps.

    Args:
        runs: Runs that were named.
        sweeps: Sweeps that were named, each with its trials that get sections of their own.
    """
    all_runs = [*runs[:MAX_RUNS], *(run for _, trials in sweeps for run in trials.values())]
    keys = {run.name: f"run-{number}" for number, run in enumerate(all_runs)}
    sections: list[Section] = []
    for number, (sweep, trials) in enumerate(sweeps):
        sections += _sweep(sweep, trials, keys, f"sweep-{number}")
    if len(runs) > 1:
        sections.append(_all_runs(runs, keys))
    is_alone = len(all_runs) == 1 and not sweeps
    for run in all_runs:
        sections += _run(run, keys[run.name], is_alone=is_alone)
    paths = [sweep.path for sweep, _ in sweeps] + [run.path for run in runs]
    names = [f"sweep {sweep.name}" for sweep, _ in sweeps]
    if runs:
        names.append(
            f"{len(runs)} runs" if len(runs) > 1 else f"{runs[0].preset}, seed {runs[0].seed}"
        )
    return Page(
        title=f"TDC Training: {', '.join(names)}", subtitle=" · ".join(paths), sections=sections
    )


def _all_runs(runs: Sequence[RunData], keys: Mapping[str, str]) -> Section:
    finished = {run.name: run.results for run in runs if run.results is not None}
    blocks: list[Block] = [
        BlockRow([*score_over_macs(run_points(finished), "runs", over_training=True)]),
        runs_table(runs, keys),
    ]
    if len(runs) > MAX_RUNS:
        blocks.append(Lines([f"The first {MAX_RUNS} runs have a section each."]))
    return Section(key="runs", title="All runs", blocks=blocks)


def _sweep(
    data: SweepData, trials: Mapping[str, RunData], keys: Mapping[str, str], key: str
) -> Iterator[Section]:
    sweep = data.sweep
    done = [trial for trial in sweep.rows if trial.score is not None]
    others = len(sweep.rows) - len(done)
    means = finished_settings(sweep.settings)
    best = min(means, key=lambda setting: setting.mean["score"], default=None)
    tiles = [("trials", str(len(sweep.rows)), f"{len(done)} with a score, {others} without")]
    if best is not None:
        settings = setting_text(sweep, best)
        if "score" in best.spread:
            settings += f"; ± {score_text(best.spread['score'])} over {best.num_done} seeds"
        tiles.append((f"best {sweep.metric}", score_text(best.mean["score"]), settings))
    if sweep.pareto:
        tiles.append(("Pareto front", str(len(sweep.pareto)), ", ".join(sweep.pareto[:6])))
    blocks: list[Block] = [KeyNumbers(tiles)]
    if under_way := sum(trial.status == "running" for trial in sweep.rows):
        line = f"{under_way} trials are not finished; the sweep is shown as far as it is."
        blocks.append(Lines([line], is_warning=True))
    blocks.append(BlockRow([*score_over_macs(trial_points(data), key, over_training=True)]))
    blocks.append(trials_table(data, {name: keys[run.name] for name, run in trials.items()}))
    if (settings_means := settings_table(data)) is not None:
        blocks.append(settings_means)
    if len(trials) < len(data.results):
        blocks.append(
            Lines(
                [
                    f"Of {len(data.results)} finished trials {len(trials)} have a section here, "
                    "those of the Pareto front and the best first; tdc-ray report on a trial's "
                    "directory shows any other."
                ]
            )
        )
    yield Section(key=key, title=f"Sweep {data.name}", blocks=blocks)


def _run(run: RunData, key: str, *, is_alone: bool) -> Iterator[Section]:
    """Yield a run's sections: on its own its parts, else itself with its parts below it."""
    parts = list(run_parts(run, key))
    if is_alone:
        yield from (
            Section(key=f"{key}-{name}", title=title, blocks=blocks, run=run.name)
            for name, title, blocks in parts
        )
        return
    yield Section(key=key, title=run.name, blocks=parts[0][2], run=run.name)
    for name, title, blocks in parts[1:]:
        yield Section(key=f"{key}-{name}", title=title, blocks=blocks, level=3, run=run.name)

"""A network for every sampling step: our knapsack beside other ways to choose.

    python experiments/step_schedules.py --preset digits
    python experiments/step_schedules.py --runs runs/digits-0 runs/digits-1 --budgets 0.6 0.75
    python experiments/step_schedules.py --smoke

For each budget of mean macs: ours (`tdc-ray schedule`, to which all steps count alike); the same
with steps weighed by what an error adds to a sample's, or to a bound of the samples' divergence
(`step_weights.py`); T-Stitch's (the cheapest networks at the noisiest steps); and, at the first
budget, a predictor with evolution in the manner of OMS-DPM (`predictor_search.py`). Base and the
run's own experts stand beside them. Scores are of images from noise that no choice has seen;
seconds are those of choosing, the networks being there.

Hardware and hours: `digits` about half an hour a run on 2 CPU cores, most of it the predictor's
schedules.

The paper's Table IV: OMS-DPM takes more than 3,800 thousand seconds, TDC 342 in all.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import TypeVar

from common import Flags, parse_flags, run_once
from output import mean_and_spread, plot_bars, write_record, write_table
from predictor_search import evolve
from step_weights import divergence_weights, sample_weights

from tdc_ray.config.run import RunConfig, from_json
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.schedule import FloatArray, NoiseProcess
from tdc_ray.runs.results import Results, load_results
from tdc_ray.runs.step_schedule.measure import MeasuredSteps, judge, measure_steps
from tdc_ray.runs.step_schedule.networks import ScheduleSpec, networks_of, own_choice, problem_of
from tdc_ray.runs.step_schedule.schedule import score_pipeline, write_pipeline
from tdc_ray.storage.files import exists, read_json, write_json
from tdc_ray.storage.run_dir import RunDir

T = TypeVar("T")

DATA_VARIANCE = 0.3
"""About that of a pixel of the digits over the images, in units of [-1, 1] squared."""

JUDGING_SEED, PREDICTOR_SEED = 1_000, 2_000
"""Added to the run's sampling seed: of the scores that are shown, and of the predictor's."""


@dataclass(frozen=True, kw_only=True)
class StepFlags(Flags):
    """Flags of this experiment."""

    runs: tuple[Path, ...] = ()
    """Finished runs in place of those that this experiment makes, one for each seed."""
    budgets: tuple[float, ...] = (0.6, 0.75)
    """Mean macs of a step, as shares of the base's."""
    widths: tuple[float, ...] = (0.45,)
    """Macs of further sub-models of each group, as shares of the base's."""
    num_images: int = 256
    """Noised images at each step by which networks are compared."""
    num_scored_images: int | None = None
    """Images that a shown score is taken from; default: the run's."""
    num_schedules: int = 40
    """Schedules that the predictor is trained on."""
    num_predictor_images: int = 200
    """Images that each of these is scored by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A way to choose, on one run."""

    mean_macs_share: float
    seconds: float
    """Of choosing."""
    excess: float
    """Loss above the base's, as a share, on images and noise that no choice has seen."""
    low: float
    """Of its 95 % interval."""
    high: float
    score: float


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return a result and its seconds."""
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def in_little(flags: StepFlags) -> StepFlags:
    """Return the flags of a smoke test."""
    return replace(
        flags,
        budgets=flags.budgets[:1],
        num_images=16,
        num_schedules=3,
        num_predictor_images=50,
    )


def rows_of_run(
    run: Path, out: Path, flags: StepFlags, only: Collection[str] = ()
) -> dict[str, Row]:
    """Choose in every way, judge and score; what is there already is read.

    Args:
        run: A finished run.
        out: Where networks, pipelines and rows go.
        flags: What is compared.
        only: Names of rows; none means all.
    """
    run_dir, out = RunDir(run.resolve()), out.resolve()
    config = from_json(read_json(run_dir.config))
    evaluate = config.evaluate
    images = flags.num_scored_images or evaluate.num_images
    shown = replace(evaluate, seed=evaluate.seed + JUDGING_SEED, num_images=images)
    spec = ScheduleSpec(macs_share=min(flags.budgets), widths=flags.widths)
    problem = problem_of(config, networks_of(run_dir, config, spec, out))
    data = training_data(config.data, evaluate.cache_dir)

    @cache
    def measured() -> tuple[MeasuredSteps, float]:
        return timed(lambda: measure_steps(config, data, problem, flags.num_images))

    def ours(share: float) -> list[int]:
        return measured()[0].choose(share)

    def stitch(share: float) -> list[int]:
        return measured()[0].stitch(share)

    def choose_by(weights: FloatArray, share: float) -> list[int]:
        return replace(measured()[0], weights=weights).choose(share)

    def score_of(choice: Sequence[int], settings: RunConfig, name: str) -> float:
        folder, macs = out / "pipelines" / name, problem.mean_macs(choice)
        write_pipeline(run_dir, settings, problem, choice, folder)
        return score_pipeline(run_dir, settings, folder, macs)[1]

    def predictor_score(choice: Sequence[int]) -> float:
        few = replace(
            evaluate,
            seed=evaluate.seed + PREDICTOR_SEED,
            num_images=flags.num_predictor_images,
        )
        return score_of(choice, replace(config, evaluate=few), "predictor")

    acp = NoiseProcess.of(config.diffusion).alphas_cumprod
    steps = problem.timesteps
    of_sample = sample_weights(acp, steps, DATA_VARIANCE)
    of_bound = divergence_weights(acp, steps)
    ways: dict[str, Callable[[], list[int]]] = {
        "base": lambda: [0] * len(problem.timesteps),
        "the run's experts": lambda: own_choice(problem),
    }
    for share in flags.budgets:
        ways[f"{share:g} F, ours"] = partial(ours, share)
        ways[f"{share:g} F, weighed by the sample's error"] = partial(choose_by, of_sample, share)
        ways[f"{share:g} F, weighed by the divergence"] = partial(choose_by, of_bound, share)
        ways[f"{share:g} F, T-Stitch"] = partial(stitch, share)
    first = flags.budgets[0]
    ways[f"{first:g} F, predictor and evolution"] = lambda: evolve(
        problem, problem.budget(first), predictor_score, flags.num_schedules, config.seed
    )
    rows = {}
    for name, choose in ways.items():
        if only and name not in only:
            continue
        path = out / "rows" / f"{name.replace(' ', '-')}.json"
        if not exists(path):
            of_losses, measuring = measured()
            choice, seconds = timed(choose)
            seconds += measuring if "ours" in name or "weighed" in name else 0.0
            (judgement,) = judge(config, data, of_losses, [choice], flags.num_images)
            scored = score_of(choice, replace(config, evaluate=shown), name.replace(" ", "-"))
            row = Row(
                mean_macs_share=judgement.mean_macs_share,
                seconds=seconds,
                excess=judgement.excess,
                low=judgement.low,
                high=judgement.high,
                score=scored,
            )
            write_json(path, asdict(row))
        rows[name] = Row(**read_json(path))
    return rows


def runs_of(flags: StepFlags, folder: Path) -> tuple[list[Path], list[Results]]:
    """Return the runs, which are made unless they were named, and their results."""
    if flags.runs:
        return list(flags.runs), [load_results(RunDir(run).results) for run in flags.runs]
    folders = [folder / f"seed-{seed}" for seed in flags.seeds]
    return folders, [
        run_once(flags.config(seed), run, flags.store)
        for seed, run in zip(flags.seeds, folders, strict=True)
    ]


def main(flags: StepFlags) -> None:
    """Choose for every run, and write the table."""
    folder = flags.storage / f"step_schedules-{flags.preset}"
    if flags.smoke:
        flags = in_little(flags)
    runs, results = runs_of(flags, folder)
    found = {str(run): rows_of_run(run, folder / "chosen" / run.name, flags) for run in runs}
    table = []
    for name in next(iter(found.values())):
        rows = [of_run[name] for of_run in found.values()]
        table.append(
            [
                name,
                mean_and_spread([row.score for row in rows]),
                " ".join(f"{row.excess:+.2%} ({row.low:+.2%} to {row.high:+.2%})" for row in rows),
                f"{mean(row.mean_macs_share for row in rows):.3f} F",
                f"{mean(row.seconds for row in rows):.1f}",
            ]
        )
    columns = ["schedule", results[0].metric, "loss over the base's", "macs", "seconds"]
    write_table(folder, "step_schedules", columns, table)
    bars = {name: [rows[name].score for rows in found.values()] for name, *_ in table}
    plot_bars(folder, "step_schedules", bars, results[0].metric)
    record = {
        run: {name: asdict(row) for name, row in rows.items()} for run, rows in found.items()
    }
    commits = {result.commit for result in results}
    write_record(folder, "step_schedules", flags, commits, {"runs": record})


if __name__ == "__main__":
    main(parse_flags(__doc__, StepFlags))

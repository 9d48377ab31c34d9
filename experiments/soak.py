"""What 20,000 items leave behind in a pool, and 2,000 trials in a sweep: memory, files, objects.

    python experiments/soak.py --storage runs --json experiments/results/soak.json
    python experiments/soak.py --trials 2000 --json experiments/results/soak-trials.json
    python experiments/soak.py --smoke

Items that do nothing go through the pool's actors, 200 at a time. After each 200, of the driver
and of all actors together: private memory (what no other process shares) and open files; and what
is in the object store. Each is fitted by a line over the number of items (ordinary least squares,
with the slope's 95 % interval for independent errors), the first tenth left out, in which all warm
up. Finished items are not run again, so that the same command goes on after an interruption; the
line is fitted to the driver with the most samples.

With `--trials` it is those of a sweep, all of whose runs were finished before: each trial reads
its settings and results, and reports them, and the sweep writes its table anew. Unlike in other
sweeps, two processes run all trials in turn (Ray Tune's `reuse_actors`), so that what a trial
leaves behind adds up. A sample is taken after each 10.

Hardware and hours: ten minutes on 2 CPU cores, and twenty for the trials. The paper has no such
table.
"""

import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import tyro
from output import provenance, write_table
from processes import TRIALS, open_files, private_mb, workers
from ray import tune
from scheduling import chain
from scipy.stats import linregress, t

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.run import RunConfig, to_json, with_absolute_paths
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.errors import ConfigError
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.runs.run import run
from tdc_ray.runs.sweep.results import TRIALS_DIR, TrialFinished
from tdc_ray.runs.sweep.space import Choices, Params, trial_name, with_params
from tdc_ray.runs.sweep.sweep import sweep
from tdc_ray.storage.files import (
    append_json_line,
    exists,
    read_json,
    read_json_lines,
    write_json,
)
from tdc_ray.storage.run_dir import RunDir

NUM_CHAINS, ITEMS_PER_CHAIN = 20, 10
NUM_PER_SAMPLE = NUM_CHAINS * ITEMS_PER_CHAIN
NUM_ACTORS = 2
TRIALS_PER_SAMPLE = 10

Sample = dict[str, Any]
QUANTITIES = {
    "driver_mb": "private memory of the driver, MB",
    "actors_mb": "private memory of the actors, MB",
    "driver_files": "open files of the driver",
    "actors_files": "open files of the actors",
    "object_store_mb": "in the object store, MB",
}


@dataclass(frozen=True, kw_only=True)
class SoakFlags:
    """How many items, and where they leave their results."""

    items: int = 20_000
    """Items in all."""
    trials: int = 0
    """Trials of a sweep, in place of items; 0 means items."""
    smoke: bool = False
    """A few hundred items only."""
    storage: Path = Path("runs")
    """Folder of the items' results and of the samples."""
    json: Path | None = None
    """Where the record goes, beside the table's CSV and Markdown; default: the storage."""


def sample(driver: str, number: int, actors: Sequence[int]) -> Sample:
    """Look at all processes after a number of items or trials."""
    there, free = ray.cluster_resources(), ray.available_resources()
    store = "object_store_memory"
    return {
        "driver": driver,
        "number": number,
        "driver_mb": private_mb(),
        "actors_mb": sum(private_mb(pid) for pid in actors),
        "driver_files": open_files(),
        "actors_files": sum(open_files(pid) for pid in actors),
        "object_store_mb": (there[store] - free[store]) / 1e6,
    }


def slope(samples: Sequence[Sample], quantity: str) -> tuple[float, float]:
    """Fit a line; return its slope per 1,000, and half of the slope's 95 % interval."""
    xs, ys = [one["number"] / 1000 for one in samples], [one[quantity] for one in samples]
    if len(set(ys)) == 1:  # of which linregress makes a slope of 0 and an error of NaN
        return 0.0, 0.0
    fit = linregress(xs, ys)
    return float(fit.slope), float(t.ppf(0.975, len(xs) - 2) * fit.stderr)


def fitted(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Fit a line to every quantity of the driver with the most samples."""
    ((driver, _),) = Counter(one["driver"] for one in samples).most_common(1)
    some = [one for one in samples if one["driver"] == driver]
    some = some[len(some) // 10 :]
    found = {}
    for quantity in QUANTITIES:
        middle, half = slope(some, quantity)
        found[quantity] = {
            "first": some[0][quantity],
            "last": some[-1][quantity],
            "slope_per_1000": middle,
            "half_interval": half,
        }
    return found


def soak(flags: SoakFlags, folder: Path, samples: list[Sample]) -> None:
    """Run the items, and add a sample after each part of them to the file and the list."""
    driver = secrets.token_hex(4)
    compute = ComputeConfig(num_actors=NUM_ACTORS)
    with (
        connected(num_cpus=NUM_ACTORS),
        collecting([]) as events,
        Pool(compute, events) as pool,
    ):
        for part in range(flags.items // NUM_PER_SAMPLE):
            where = folder / f"{part:05d}"
            if (where / "done").exists():
                continue
            shape = [[0.0] * ITEMS_PER_CHAIN]
            pool.run({f"{part}-{i}": chain(where, str(i), shape) for i in range(NUM_CHAINS)})
            (where / "done").touch()
            samples.append(sample(driver, (part + 1) * NUM_PER_SAMPLE, workers()))
            append_json_line(folder / "samples.jsonl", samples[-1])


def trial_config(folder: Path) -> RunConfig:
    """Return settings of a small run, on an untrained base that is made if need be."""
    base = folder / "base" / "unet"
    if not base.exists():
        save_unet(build_unet(architecture("tiny")), base)
    config = preset("digits-smoke")
    config = replace(
        config,
        model=replace(config.model, base=str(base)),
        plan=replace(config.plan, num_groups=1),
        prune=replace(config.prune, method="none"),
        finetune=replace(config.finetune, num_steps=1, num_warmup_steps=0),
        compute=replace(config.compute, num_actors=1),
        evaluate=replace(config.evaluate, cache_dir=str(folder / "cache")),
    )
    return with_absolute_paths(config)


def finish_runs(config: RunConfig, folder: Path, points: Sequence[Params]) -> None:
    """Run once; write its results, and settings of their own, as those of the trials."""
    run(config, folder / "run")
    results = read_json(RunDir(folder / "run").results)
    for params in points:
        run_dir = RunDir(folder / "sweep" / TRIALS_DIR / trial_name(params, config.seed))
        if not run_dir.results.exists():
            write_json(run_dir.config, to_json(with_params(config, params, config.seed)))
            write_json(run_dir.results, results)


def soak_sweep(flags: SoakFlags, folder: Path, samples: list[Sample]) -> None:
    """Sweep over finished runs, and add a sample after each 10 to the file and the list."""
    driver, config, done = secrets.token_hex(4), trial_config(folder), 0
    steps = Choices(tuple(range(1, flags.trials + 1)))
    points: list[Params] = [{"finetune.num_steps": value} for value in steps.values]
    finish_runs(config, folder, points)

    def note(event: object) -> None:
        nonlocal done
        if isinstance(event, TrialFinished):
            done += 1
            if done % TRIALS_PER_SAMPLE == 0 and (trials := workers(TRIALS)):
                samples.append(sample(driver, done, trials))
                append_json_line(folder / "samples.jsonl", samples[-1])

    tune.TuneConfig = partial(tune.TuneConfig, reuse_actors=True)  # type: ignore[assignment,misc]
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "60"  # of a trial that ends, on a busy machine
    space = {"finetune.num_steps": steps}
    sweep(config, space, SweepConfig(), folder / "sweep", points, sinks=[note])


def main(flags: SoakFlags) -> None:
    """Run, fit and write."""
    what, name = ("trials", "soak-trials") if flags.trials else ("items", "soak")
    if flags.smoke:
        smoke = (
            {"trials": 5 * TRIALS_PER_SAMPLE} if flags.trials else {"items": 5 * NUM_PER_SAMPLE}
        )
        flags = replace(flags, **smoke)
    least = 5 * (TRIALS_PER_SAMPLE if flags.trials else NUM_PER_SAMPLE)
    if (flags.trials or flags.items) < least:
        raise ConfigError(f"--{what} must be at least {least}, got {flags.trials or flags.items}.")
    folder = (flags.storage / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "samples.jsonl"
    samples = read_json_lines(lines) if exists(lines) else []
    (soak_sweep if flags.trials else soak)(flags, folder, samples)
    found = fitted(samples)
    rows = [
        [
            title,
            f"{found[quantity]['first']:.1f}",
            f"{found[quantity]['last']:.1f}",
            f"{found[quantity]['slope_per_1000']:+.4f} ± {found[quantity]['half_interval']:.4f}",
        ]
        for quantity, title in QUANTITIES.items()
    ]
    record = flags.json or folder / f"{name}.json"
    columns = ["quantity", "first", "last", f"slope per 1,000 {what}"]
    write_table(record.parent, record.stem, columns, rows)
    write_json(record, {"made_by": provenance(), "fitted": found, "samples": samples})


if __name__ == "__main__":
    main(tyro.cli(SoakFlags, description=__doc__))

"""Table IV: what does the search for sub-models cost beside their fine-tuning?

    python experiments/time_cost.py --preset digits
    python experiments/time_cost.py --smoke

One run of TDC per seed; its seconds by stage, summed over workers: waiting for the proxy,
measuring for it (sensitivities, refits, candidates), fine-tuning, everything. `--proxy llm
--llm.model NAME` asks a language model; the table's note then has its tokens, their price, and
what its experts gain over the offline proxy's before the fine-tune, at equal measurements and
finalists (that one in the model's place). Two rows more: what it takes to choose a network for
every sampling step at 0.6 F, by `tdc-ray schedule` and by a predictor and evolution in the manner
of OMS-DPM (`step_schedules.py`), with the score of each.

Hardware and hours: `digits` takes about 30 minutes a seed on 2 CPU cores.

The paper (thousands of seconds, CIFAR-10): GPT-4 inference 0.078, fine-tuning 190, total 342;
OMS-DPM, which trains a predictor, more than 3800.
"""

from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from common import ProxyFlags, parse_flags, run_once, workers
from output import mean_and_spread, paper_column, plot_bars, write_record, write_table
from proxy_cost import ALONE, excess_loss
from stages import searches_of
from step_schedules import Row, StepFlags, in_little, rows_of_run

from tdc_ray.config.run import with_absolute_paths
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.search import search_submodel
from tdc_ray.runs.results import Results
from tdc_ray.storage.run_dir import RunDir

PAPER = {"cifar10": {"proxy": "78", "fine-tuning": "190,000", "total": "342,000"}}


BUDGET = 0.6
"""Mean macs of a sampling step, as a share of the base's, for which its network is chosen."""


def seconds_of(results: Results) -> dict[str, float]:
    """Return the seconds of every row, summed over workers."""
    spent = results.seconds
    stages = {
        "proxy": results.prune.proxy_seconds,
        "measuring": spent.prune,
        "fine-tuning": spent.finetune,
        "base": spent.base,
        "evaluation": spent.evaluate,
    }
    return stages | {"total": sum(stages.values())}


def excess_of_offline(flags: ProxyFlags, folder: Path, seed: int) -> float:
    """Return the mean excess loss of a run's refitted experts with the offline proxy alone.

    It has as many measurements and finalists as the search by a model, in whose place it is, too.
    """
    config = with_absolute_paths(flags.config(seed))
    root = folder / f"seed-{seed}-offline"
    run_dir = RunDir(root.resolve(), (folder / f"seed-{seed}" / "base" / "unet").resolve())
    with workers(config, root, flags.store) as pool:
        _, tasks = searches_of(pool, config, run_dir.base_unet, run_dir)
        memory = MemoryBank(run_dir.memory)
        found = pool.run({task.name: search_submodel(task, memory, ALONE) for task in tasks})
    return fmean(map(excess_loss, found.values()))


def steps_of(flags: ProxyFlags, folder: Path, seed: int) -> dict[str, Row]:
    """Choose a network for every sampling step of a run, in two ways."""
    how = StepFlags(budgets=(BUDGET,))
    names = [f"{BUDGET:g} F, {way}" for way in ("ours", "predictor and evolution")]
    how = in_little(how) if flags.smoke else how
    return rows_of_run(folder / f"seed-{seed}", folder / f"steps-{seed}", how, names)


def main(flags: ProxyFlags) -> None:
    """Run all seeds and write the table."""
    folder = flags.storage / f"time_cost-{flags.preset}-{flags.proxy}"
    found = []
    for seed in flags.seeds:
        config = flags.config(seed)
        found.append(run_once(config, folder / f"seed-{seed}", flags.store))
    seconds, note, gain = [seconds_of(results) for results in found], "", None
    if flags.proxy == "llm":
        gain = fmean(
            fmean(map(excess_loss, one.groups)) - excess_of_offline(flags, folder, seed)
            for seed, one in zip(flags.seeds, found, strict=True)
        )
        prunes = [results.prune for results in found]
        note = (
            f"{sum(one.prompt_tokens for one in prunes):,} tokens of prompts, "
            f"{sum(one.completion_tokens for one in prunes):,} of replies, price "
            f"{sum(one.proxy_cost for one in prunes):.4g}. Mean excess loss of the experts before "
            f"the fine-tune, against the offline proxy's at equal measurements: {gain:+.3g}."
        )
    paper = paper_column(PAPER, flags.preset)
    rows = [
        [row, f"{fmean(by[row] for by in seconds):,.2f}", paper.get(row, "-"), "-"]
        for row in seconds[0]
    ]
    searched = [steps_of(flags, folder, seed) for seed in flags.seeds]
    for name in searched[0]:
        took = f"{fmean(by[name].seconds for by in searched):,.2f}"
        scores = mean_and_spread([by[name].score for by in searched])
        rows.append([f"steps at {name}", took, "-", scores])
    columns = ["stage", "seconds", paper[""], found[0].metric]
    write_table(folder, "time_cost", columns, rows, note)
    bars = {row: [by[row] for by in seconds] for row in seconds[0]}
    plot_bars(folder, "time_cost", bars, "seconds")
    record = {
        "method": flags.proxy,
        "seconds": seconds,
        "difference_from_offline": gain,
        "prune": [asdict(results.prune) for results in found],
        "steps": [{name: asdict(row) for name, row in by.items()} for by in searched],
    }
    write_record(folder, "time_cost", flags, {results.commit for results in found}, record)


if __name__ == "__main__":
    main(parse_flags(__doc__, ProxyFlags))

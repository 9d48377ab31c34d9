"""Table IV: what does the search for sub-models cost beside their fine-tuning?

    python experiments/time_cost.py --preset digits
    python experiments/time_cost.py --smoke

One run of TDC per seed; its seconds by stage, summed over workers: waiting for the proxy,
measuring for it (sensitivities, refits, candidates), fine-tuning, everything. `--proxy llm
--llm.model NAME` asks a language model; the table's note then has its tokens, their price, and
what its experts gain over the offline proxy's before the fine-tune, at equal measurements (twice
as many of that one alone). Two rows more: what it takes to choose a network for every sampling
step at 0.6 F, by `tdc-ray schedule` and by a predictor and evolution in the manner of OMS-DPM
(`step_schedules.py`), with the score of each.

Hardware and hours: `digits` takes about 30 minutes a seed on 2 CPU cores.

The paper (thousands of seconds, CIFAR-10): GPT-4 inference 0.078, fine-tuning 190, total 342;
OMS-DPM, which trains a predictor, more than 3800.
"""

from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

from common import ProxyFlags, parse_flags, run_once
from output import mean_and_spread, paper_column, plot_bars, write_record, write_table
from proxy_cost import offline_at_equal_measurements
from step_schedules import Row, StepFlags, in_little, rows_of_run

from tdc_ray.runs.results import GroupResult, Results

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


def gain_over_offline(flags: ProxyFlags, folder: Path, seed: int, results: Results) -> float:
    """Return the mean excess loss of a run's refitted experts less that of the offline proxy's."""
    config = flags.config(seed)
    config = replace(config, prune=offline_at_equal_measurements(config.prune))
    offline = run_once(config, folder / f"seed-{seed}-offline", flags.store)

    def excess(group: GroupResult) -> float:
        loss = group.loss_cut if group.loss_refit is None else group.loss_refit
        return loss - group.loss_base

    pairs = zip(results.groups, offline.groups, strict=True)
    return mean(excess(one) - excess(other) for one, other in pairs)


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
        gain = mean(
            gain_over_offline(flags, folder, seed, one)
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
        [row, f"{mean(by[row] for by in seconds):,.2f}", paper.get(row, "-"), "-"]
        for row in seconds[0]
    ]
    searched = [steps_of(flags, folder, seed) for seed in flags.seeds]
    for name in searched[0]:
        took = f"{mean(by[name].seconds for by in searched):,.2f}"
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

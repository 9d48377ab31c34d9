"""Table IV: what does the search for sub-models cost beside their fine-tuning?

    python experiments/time_cost.py --preset digits
    python experiments/time_cost.py --smoke

One run of TDC per seed; its seconds by stage, summed over workers: waiting for the proxy,
measuring for it (sensitivities, refits, candidates), fine-tuning, everything. `--proxy llm
--llm.model NAME` asks a language model.

Hardware and hours: `digits` takes about 10 minutes a seed on 2 CPU cores.

The paper (thousands of seconds, CIFAR-10): GPT-4 inference 0.078, fine-tuning 190, total 342;
OMS-DPM, which trains a predictor, more than 3800.
"""

from dataclasses import asdict
from statistics import mean

from common import ProxyFlags, parse_flags, run_once
from output import paper_column, plot_bars, write_record, write_table

from tdc_ray.runs.results import Results

PAPER = {"cifar10": {"proxy": "78", "fine-tuning": "190,000", "total": "342,000"}}


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


def main(flags: ProxyFlags) -> None:
    """Run all seeds and write the table."""
    folder = flags.storage / f"time_cost-{flags.preset}-{flags.proxy}"
    found = []
    for seed in flags.seeds:
        config = flags.config(seed)
        found.append(run_once(config, folder / f"seed-{seed}", flags.store))
    seconds = [seconds_of(results) for results in found]
    paper = paper_column(PAPER, flags.preset)
    rows = [
        [row, f"{mean(by[row] for by in seconds):,.2f}", paper.get(row, "-")] for row in seconds[0]
    ]
    columns = ["stage", "seconds", paper[""]]
    write_table(folder, "time_cost", columns, rows)
    bars = {row: [by[row] for by in seconds] for row in seconds[0]}
    plot_bars(folder, "time_cost", bars, "seconds")
    record = {
        "method": flags.proxy,
        "seconds": seconds,
        "prune": [asdict(results.prune) for results in found],
    }
    write_record(folder, "time_cost", flags, {results.commit for results in found}, record)


if __name__ == "__main__":
    main(parse_flags(__doc__, ProxyFlags))

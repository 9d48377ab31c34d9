"""How fast everything is, beside what a user would run instead, in one process and in turns.

    python experiments/speed.py --json experiments/results/speed.json --run runs/digits
    python experiments/speed.py --sections training update --repeats 9
    python experiments/speed.py --smoke

Architecture, batch and threads are the same for all of a section, and a row says its precision.
Ratios are of medians; the spread is the least and the largest. `training`: a step of
`iddpm-cifar10` (three outputs, L_simple) at batch 8, against diffusers' unconditional example.
`update`: its clipping, optimizer and EMA alone. `loading`: images from PNG files and npz, against
torchvision's ImageFolder with the example's transforms. `measuring`: a candidate's loss and a
unit's sensitivity, against the whole pruned network for each; `ours, refit too` does more than
that. `counting`: the macs of a scheme by table, against a model that is built, pruned and run, and
fitting it to a limit. `depth`: CPU time of forward passes of a DiT pruned to as many macs by width
and by whole blocks. `sampling`: 64 images in 20 DDIM steps, against diffusers' DDIMPipeline
(which gets a last convolution without the learned variance), and experts of random weights pruned
to their limits (k = 0.5, N = 10); ours also by Winograd's convolutions and in bf16. `starting`:
processes from start to end. `memory`: peaks, each in a process of its own. `digits`: where the
wall time of the finished run `--run` went.

Hardware and hours: about an hour and a half on 2 CPU cores, half of it sampling.

The paper has no such table. The targets are in AIMS, and results are printed beside them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from benchmark import pruning, sampling, system, training
from benchmark.timing import Row, SpeedFlags, check_flags, ratio, use_threads
from output import provenance, write_table

from tdc_ray.errors import ConfigError
from tdc_ray.storage.files import write_json
from tdc_ray.storage.provenance import versions

SECTIONS: Mapping[str, Callable[[SpeedFlags], list[Row]]] = {
    "training": training.step,
    "update": training.update,
    "loading": training.loading,
    "measuring": pruning.measuring,
    "counting": pruning.counting,
    "depth": pruning.depth,
    "sampling": sampling.sampling,
    "starting": system.starting,
    "memory": system.memory,
    "digits": system.digits,
}


@dataclass(frozen=True)
class Aim:
    """A bound on the results."""

    section: str
    """Of the rows that it is about, or how it begins."""

    name: str
    """How these rows' names begin."""

    quantity: Literal["times as fast", "ratio", "median"]
    """times as fast: the best of the rows against the other's, at least the bound. ratio: the
    same the other way round, and median: the row's own; the worst of them, at most the bound."""

    bound: float
    text: str


AIMS = (
    Aim("training step", "ours", "times as fast", 1.4, "training step (with bf16 in hardware)"),
    Aim("training step", "ours, fp32", "times as fast", 1.0, "training step, fp32: not slower"),
    Aim("peak memory, training", "ours", "ratio", 1.0, "peak memory of training"),
    Aim("sampling", "ours, base", "times as fast", 1.5, "sampling with the base, fp32"),
    Aim("sampling", "winograd: ours, base", "times as fast", 1.5, "the same, by Winograd"),
    Aim("sampling", "bf16: ours, base", "times as fast", 1.5, "the same, bf16"),
    Aim("sampling", "images, ", "ratio", 1.0, "images differ as by bf16 autocast"),
    Aim("sampling", "experts' time", "median", 1.1, "experts' time over their macs, fp32"),
    Aim("sampling", "winograd: experts' time", "median", 1.1, "the same, by Winograd"),
    Aim("sampling", "bf16: experts' time", "median", 1.1, "the same, bf16"),
    Aim("counting", "our table", "median", 50.0, "counting a scheme, us"),
    Aim("counting", "repair", "median", 5.0, "repair of a scheme, ms"),
    Aim("start-up", "import tdc_ray", "median", 0.3, "import tdc_ray, s"),
    Aim("start-up", "tdc-ray --help", "median", 1.5, "tdc-ray --help, s"),
    Aim("start-up", "tdc-ray plan", "median", 5.0, "tdc-ray plan --preset cifar10, s"),
    Aim("digits", "neither", "median", 0.3, "digits: neither training, measuring nor sampling"),
)
"""Those of the project, for 2 cores."""


def other(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the row that another is compared with."""
    same = (one for one in rows if one.section == row.section and one.name == row.against)
    return next(same, None)


def verdict(aim: Aim, rows: Sequence[Row]) -> str | None:
    """Return the result of an aim; None means that it was not measured."""
    values = []
    for row in rows:
        if row.section.startswith(aim.section) and row.name.startswith(aim.name):
            against = other(row, rows)
            if aim.quantity == "median":
                values.append(row.median)
            elif against is not None:
                share = ratio(row, against)
                values.append(1 / share if aim.quantity == "times as fast" else share)
    if not values:
        return None
    best = max(values)
    if aim.quantity == "times as fast":
        met, rule = best >= aim.bound, "at least"
    else:
        met, rule = best <= aim.bound, "at most"
    unit = "" if aim.quantity == "median" else f" {aim.quantity}"
    word = "reached" if met else "missed"
    return f"{aim.text}: {best:.3g}{unit}, aim {rule} {aim.bound:g}: {word}"


def number(value: float) -> str:
    """Write a number with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def line(row: Row, rows: Sequence[Row]) -> list[str]:
    """Return a row's line of the table."""
    against = other(row, rows)
    how = [row.precision] * bool(row.precision) + [f"batch {row.batch}"] * bool(row.batch)
    low, high = number(min(row.values)), number(max(row.values))
    return [
        row.section,
        row.name,
        ", ".join(how),
        f"{number(row.median)} {row.unit}",
        "" if len(row.values) < 2 else f"{low} to {high}",
        "" if against is None else number(ratio(row, against)),
    ]


def record(row: Row, rows: Sequence[Row], threads: int) -> dict[str, object]:
    """Return a row's part of the JSON."""
    against = other(row, rows)
    compared = None if against is None else ratio(row, against)
    return {**asdict(row), "threads": threads, "median": row.median, "ratio": compared}


def bf16_in_hardware() -> str:
    """Return the processor's support of bf16."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    found = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags]
    return ", ".join(found) or "nothing"


def main(flags: SpeedFlags) -> None:
    """Measure, print, and write table and numbers."""
    check_flags(flags.sections, SECTIONS, flags.repeats)
    if flags.smoke:
        flags = replace(flags, repeats=1)
    if "digits" in flags.sections and flags.run is None:
        raise ConfigError("--sections digits needs a finished run: give its directory by --run.")
    threads = use_threads(flags.threads)
    rows: list[Row] = []
    for name in flags.sections or SECTIONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += SECTIONS[name](flags)
    verdicts = [found for aim in AIMS if (found := verdict(aim, rows)) is not None]
    bf16 = bf16_in_hardware()
    legend = (
        f"{threads} threads; for bf16 the processor has: {bf16}. Ratio: to the median of what the "
        "row is held against, another of its section."
    )
    columns = ["section", "what", "how", "median", "spread", "ratio"]
    table = [line(row, rows) for row in rows]
    write_table(
        flags.json.parent, flags.json.stem, columns, table, "\n\n".join([legend, *verdicts])
    )
    made_by = provenance() | {
        "bf16": bf16,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }
    document = {"made_by": made_by, "verdicts": verdicts}
    written = [record(row, rows, threads) for row in rows]
    write_json(flags.json, {**document, "rows": written})


if __name__ == "__main__":
    main(tyro.cli(SpeedFlags, description=__doc__))

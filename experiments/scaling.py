"""How time and memory grow with groups, rounds, candidates, units, images and model size.

    python experiments/scaling.py --json experiments/results/scaling.json
    python experiments/scaling.py --smoke

Each number alone, the others small: the driver's work (planning, proposing, counting schemes,
memory bank, timeline, scheduler, results, report) and that of workers (training, measuring, refit,
sampling, loading experts). Times are CPU seconds of all threads, medians, in turns. Growth is
fitted by least squares as an exponent: the slope of the logarithms, over all points, and between
the last two, where what does not grow weighs least. What has either above LINEAR (1.1) is marked,
with the reason.

Hardware and hours: about 5 minutes on 2 CPU cores.

The paper has no such table.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from benchmark import driver_axes, model_axes, show_axes
from benchmark.growth import LINEAR, Axis, ScalingFlags
from benchmark.timing import check_flags, use_threads
from output import plot_growth, provenance, write_table

from tdc_ray.storage.files import write_json

AXES: Mapping[str, Callable[[ScalingFlags, Path], list[Axis]]] = {
    "planning": driver_axes.planning,
    "proposing": driver_axes.proposing,
    "counting": driver_axes.counting,
    "keeping": driver_axes.keeping,
    "scheduling": driver_axes.scheduling,
    "showing": show_axes.showing,
    "training": model_axes.training,
    "measuring": model_axes.measuring,
    "sampling": model_axes.sampling,
    "memory": model_axes.memory,
}


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is measured, how often, and where it goes."""

    sections: tuple[str, ...] = ()
    """Costs; none means all."""
    repeats: int = 3
    """Timed repeats of each point, after one that does not count."""
    threads: int = 0
    """Threads of torch; 0 means one per processor."""
    json: Path = Path("runs/scaling.json")
    """Where the numbers go, with what made them; table and plot go beside them."""
    smoke: bool = False
    """A quick check: two points of each, one repeat, no memory."""


def short(value: float) -> str:
    """Write a number of things."""
    return f"{value / 1e6:.1f} M" if value >= 1e6 else f"{value:,.0f}"


def line(axis: Axis) -> list[str]:
    """Return a cost's line of the table."""
    (low, _), (high, _) = axis.points[0], axis.points[-1]
    first, last = axis.medians[0], axis.medians[-1]
    return [
        axis.what,
        f"{axis.over}, {short(low)} to {short(high)}",
        f"{first:.3g} to {last:.3g} {axis.unit}",
        f"{axis.exponent:.2f}",
        f"{axis.last_exponent:.2f}",
        "" if axis.is_linear else "*",
    ]


def main(flags: Flags) -> None:
    """Measure, print, and write table, plot and numbers."""
    check_flags(flags.sections, AXES, flags.repeats)
    threads = use_threads(flags.threads)
    much = ScalingFlags(repeats=1 if flags.smoke else flags.repeats, smoke=flags.smoke)
    axes: list[Axis] = []
    with tempfile.TemporaryDirectory() as place:
        for name in flags.sections or AXES:
            print(f"{name} ...", file=sys.stderr, flush=True)
            folder = Path(place, name)
            folder.mkdir()
            axes += AXES[name](much, folder)
    columns = ["what", "over", "takes", "exponent", "at the end", "*"]
    faster = [axis for axis in axes if not axis.is_linear]
    legend = f"{threads} threads; * an exponent is above {LINEAR}: {len(faster)} of {len(axes)}."
    reasons = [f"{axis.what} over {axis.over}: {axis.reason}." for axis in faster]
    folder, name = flags.json.parent, flags.json.stem
    write_table(
        folder, name, columns, [line(axis) for axis in axes], "\n\n".join([legend, *reasons])
    )
    plot_growth(
        folder,
        name,
        {
            f"{axis.what} over {axis.over} ({axis.exponent:.2f})": (
                [x for x, _ in axis.points],
                axis.medians,
            )
            for axis in axes
            if axis.unit != "MB"
        },
    )
    made_by = provenance() | {"threads": threads}
    fitted = [
        {**asdict(axis), "exponent": axis.exponent, "exponent_at_the_end": axis.last_exponent}
        for axis in axes
    ]
    write_json(flags.json, {"made_by": made_by, "linear": LINEAR, "costs": fitted})


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))

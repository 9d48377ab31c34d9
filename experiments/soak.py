"""What 20,000 items leave behind in a pool: memory, open files and object store over time.

    python experiments/soak.py --storage runs --json experiments/results/soak.json
    python experiments/soak.py --smoke

Items that do nothing go through the pool's actors, 200 at a time. After each 200, of the driver
and of all actors together: private memory (what no other process shares) and open files; and what
is in the object store. Each is fitted by a line over the number of items (ordinary least squares,
with the slope's 95 % interval for independent errors), the first tenth left out, in which all warm
up. Finished items are not run again, so that the same command goes on after an interruption; the
line is fitted to the driver with the most samples.

Hardware and hours: four minutes on 2 CPU cores. The paper has no such table.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import tyro
from output import provenance, write_table
from processes import open_files, private_mb, workers
from scheduling import chain
from scipy.stats import linregress, t

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.errors import ConfigError
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.storage.files import append_json_line, exists, read_json_lines, write_json

NUM_CHAINS, ITEMS_PER_CHAIN = 20, 10
NUM_PER_SAMPLE = NUM_CHAINS * ITEMS_PER_CHAIN
NUM_ACTORS = 2

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
    smoke: bool = False
    """A few hundred items only."""
    storage: Path = Path("runs")
    """Folder of the items' results and of the samples."""
    json: Path | None = None
    """Where the record goes, beside the table's CSV and Markdown; default: the storage."""


def sample(driver: str, num_items: int) -> Sample:
    """Look at all processes."""
    there, free = ray.cluster_resources(), ray.available_resources()
    actors = workers()
    store = "object_store_memory"
    return {
        "driver": driver,
        "items": num_items,
        "driver_mb": private_mb(),
        "actors_mb": sum(private_mb(pid) for pid in actors),
        "driver_files": open_files(),
        "actors_files": sum(open_files(pid) for pid in actors),
        "object_store_mb": (there[store] - free[store]) / 1e6,
    }


def slope(samples: Sequence[Sample], quantity: str) -> tuple[float, float]:
    """Fit a line; return its slope per 1,000 items, and half of the slope's 95 % interval."""
    xs, ys = [one["items"] / 1000 for one in samples], [one[quantity] for one in samples]
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
            samples.append(sample(driver, (part + 1) * NUM_PER_SAMPLE))
            append_json_line(folder / "samples.jsonl", samples[-1])


def main(flags: SoakFlags) -> None:
    """Run, fit and write."""
    if flags.items < 5 * NUM_PER_SAMPLE:
        raise ConfigError(f"--items must be at least {5 * NUM_PER_SAMPLE}, got {flags.items}.")
    folder = flags.storage / "soak"
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "samples.jsonl"
    samples = read_json_lines(lines) if exists(lines) else []
    if flags.smoke:
        flags = SoakFlags(items=5 * NUM_PER_SAMPLE, storage=flags.storage, json=flags.json)
    soak(flags, folder, samples)
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
    record = flags.json or folder / "soak.json"
    columns = ["quantity", "first", "last", "slope per 1,000 items"]
    write_table(record.parent, record.stem, columns, rows)
    write_json(record, {"made_by": provenance(), "fitted": found, "samples": samples})


if __name__ == "__main__":
    main(tyro.cli(SoakFlags, description=__doc__))

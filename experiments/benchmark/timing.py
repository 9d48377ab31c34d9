"""Timing: alternately, several times, as ratios; and the resulting rows."""

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tdc_ray.errors import ConfigError
from tdc_ray.models.units import Unit


@dataclass(frozen=True, kw_only=True)
class SpeedFlags:
    """What is measured, how often, and where it goes."""

    sections: tuple[str, ...] = ()
    """Sections; none means all."""
    repeats: int = 5
    """Timed repeats of each way, after one that does not count."""
    threads: int = 0
    """Threads of torch; 0 means one per processor."""
    images: int = 64
    """Images sampled at once."""
    steps: int = 20
    """DDIM steps."""
    run: Path | None = None
    """A finished run, for the section digits."""
    json: Path = Path("runs/speed.json")
    """Where the numbers go, with what made them; a table goes beside them."""
    smoke: bool = False
    """A quick check: tiny models and one repeat."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The cost of one way of doing something: less is better, whatever the unit."""

    section: str
    name: str
    unit: str
    values: tuple[float, ...]
    """One for each repeat; those of one section were measured alternately."""

    precision: str = "fp32"
    """Empty: it does not matter."""

    batch: int | None = None
    against: str | None = None
    """The row of the section that this one is compared with."""

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)


def ratio(row: Row, other: Row) -> float:
    """Return the ratio of the medians."""
    return row.median / other.median


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    scale: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, ...]]:
    """Time several ways alternately (A, B, A, B, ...), so that other load affects all alike.

    Args:
        ways: What to call, by name; each once before, unless it is timed but once.
        repeats: How often each.
        scale: What seconds are multiplied with.
        clock: Returns the time.
    """
    values: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(0 if repeats == 1 else -1, repeats):
        for name, way in ways.items():
            started = clock()
            way()
            if number >= 0:
                values[name].append(scale * (clock() - started))
    return {name: tuple(some) for name, some in values.items()}


def precision_of(name: str) -> str:
    """Return a way's precision by its name."""
    return "bf16" if "bf16" in name else "fp32"


def compared(
    section: str,
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    against: str | None = None,
    unit: str = "s",
    scale: float = 1.0,
    batch: int | None = None,
    precision: Callable[[str], str] = precision_of,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time several ways alternately and compare all with one of them.

    Args:
        section: The section.
        ways: What to call, by name.
        repeats: How often each.
        against: The way that the others are compared with, if any.
        unit: Unit of the values.
        scale: Factor from seconds to the unit.
        batch: Images at once.
        precision: Returns a way's precision.
        clock: Returns the time.
    """
    return [
        Row(
            section=section,
            name=name,
            unit=unit,
            values=values,
            precision=precision(name),
            batch=batch,
            against=None if name == against else against,
        )
        for name, values in in_turns(ways, repeats, scale=scale, clock=clock).items()
    ]


def peak_bytes() -> int:
    """Return the peak resident memory of this process.

    getrusage's ``ru_maxrss`` would count what the parent had before the process started its own
    program; VmHWM does not.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_mb(work: Callable[..., object], *arguments: Any) -> tuple[float, float]:
    """Call a function in a process of its own.

    Returns:
        The process's peak memory, and by how much it is above what it took with all imported; MB.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        before, after = process.submit(_peaks, partial(work, *arguments)).result()
    return after / 1e6, (after - before) / 1e6


def _peaks(work: Callable[[], object]) -> tuple[int, int]:
    before = peak_bytes()
    work()
    return before, peak_bytes()


def check_flags(sections: Collection[str], known: Collection[str], repeats: int) -> None:
    """Check that sections exist and repeats are enough.

    Raises:
        ConfigError: They do not, or are not.
    """
    if unknown := set(sections) - set(known):
        names = ", ".join(known)
        raise ConfigError(f"--sections must be among {names}, got {', '.join(sorted(unknown))}.")
    if repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {repeats}.")


def use_threads(threads: int) -> int:
    """Set torch's threads, 0 means its default; return their number."""
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def random_scheme(units: tuple[Unit, ...], seed: int) -> dict[str, int]:
    """Draw a width for every unit."""
    draw = random.Random(seed)
    return {unit.name: draw.randint(1, unit.width) for unit in units}

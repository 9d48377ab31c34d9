"""Measures how long each unit takes at each width, on a worker's device.

The base is run step by step, alternately with the base pruned to one width of every unit: inner
units do not change the stream, so that every block has the same input sizes as in any other
scheme, and a pass times all blocks in place, with realistic caches.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from scipy.optimize import isotonic_regression

from tdc_ray.errors import ConfigError
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.device import worker_device
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.models.families import build_network, family_of
from tdc_ray.models.network_config import NetworkConfig, class_name
from tdc_ray.models.timing import device_name, time_passes
from tdc_ray.models.units import Unit
from tdc_ray.pruning.costs import LatencyTable
from tdc_ray.pruning.space import Space

MAX_LEVELS = 8
"""Most widths of a unit that are measured, its own among them; others are interpolated."""

MIN_REPEATS, MIN_SECONDS = 9, 2.0
"""Least passes of each model at a level, and their least seconds together."""


@dataclass(frozen=True, slots=True)
class LatencyJob:
    """Time a network's units; only shapes count, so its weights are random."""

    network: NetworkConfig
    space: Space
    batch_size: int


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """The measured times, and the conditions."""

    device: str
    batch_size: int
    base_ns: int
    units: Mapping[str, Mapping[int, int]]
    """Nanoseconds by unit and width."""

    seconds: float


def timed_space(path: Path, network: NetworkConfig, space: Space, batch_size: int) -> Chain[Space]:
    """Measure the times of a space's units, and return the space with time as what is limited.

    Args:
        path: File of the measured times: they are measured once.
        network: The base's config.
        space: The base's space.
        batch_size: Images of a forward pass.

    Raises:
        ConfigError: The network's units do not run by themselves.
    """
    if not space.has_steps:
        raise ConfigError(
            f"prune.objective must be macs for a {class_name(network)}, got latency: it has no "
            "description here (models.traced), by which the times of its parts could be measured."
        )
    passes = 2 * MAX_LEVELS * MIN_REPEATS * batch_size
    item = WorkItem(
        key="latency",
        function=measure_latency,
        job=LatencyJob(network, space, batch_size),
        result_path=path,
        cost=float(passes * space.macs_base),
        num_steps=MAX_LEVELS - 1,
        result_type=LatencyResult,
    )
    measured = yield from result_of(item)
    return space.timed(latency_table(measured, space.units))


def measure_latency(job: LatencyJob, report: Report) -> LatencyResult:
    """Time the base and every unit at several widths."""
    started, space, device = time.perf_counter(), job.space, worker_device()
    base = build_network(job.network).to(device).eval()
    passes = []
    for number, widths in enumerate(_schemes(space), start=1):
        kept = {name: tuple(range(width)) for name, width in widths.items()}
        whole, part = time_passes(
            [base, family_of(base).cut(base, space.units, kept)],
            job.batch_size,
            min_repeats=MIN_REPEATS,
            min_seconds=MIN_SECONDS,
        )
        passes.append((widths, whole, part))
        report({"base_milliseconds": 1e3 * whole.total}, number)
    total = median(whole.total for _, whole, _ in passes)
    units: dict[str, dict[int, list[float]]] = {unit.name: {} for unit in space.units}
    for widths, whole, part in passes:
        pace = total / whole.total  # scaled to the machine's median speed
        for unit in space.units:
            for width, timed in ((unit.width, whole), (widths[unit.name], part)):
                units[unit.name].setdefault(width, []).append(pace * timed.steps[unit.name])
    return LatencyResult(
        device=device_name(device),
        batch_size=job.batch_size,
        base_ns=round(1e9 * total),
        units={
            name: {width: round(1e9 * median(times[width])) for width in sorted(times)}
            for name, times in units.items()
        },
        seconds=time.perf_counter() - started,
    )


def latency_table(measured: LatencyResult, units: Sequence[Unit]) -> LatencyTable:
    """Return the table of measured times: never falling with the width, linear in between.

    A narrower unit takes no longer than the whole one, whose measured time is kept.
    """
    times = {}
    for unit in units:
        by_width = measured.units[unit.name]
        widths = sorted(by_width)
        measured_ns = [min(by_width[width], by_width[unit.width]) for width in widths]
        rising = isotonic_regression(measured_ns).x
        between = np.interp(np.arange(1, unit.width + 1), widths, rising)
        times[unit.name] = (0, *(max(1, round(float(ns))) for ns in between))
    blocks = sum(by_width[-1] for by_width in times.values())
    return LatencyTable(max(0, measured.base_ns - blocks), times)


def _schemes(space: Space) -> list[dict[str, int]]:
    """Return at most so many schemes that cover all narrower legal widths of every unit.

    All units are there in each: one that is gone takes no time.
    """
    present = {name: [w for w in legal if w] for name, legal in space.legal.items()}
    most = min(MAX_LEVELS, max(map(len, present.values())))
    return [
        {
            name: legal[round((len(legal) - 1) * level / max(1, most - 1))]
            for name, legal in present.items()
        }
        for level in range(max(1, most - 1))
    ]

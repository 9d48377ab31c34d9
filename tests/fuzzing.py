"""Reads files from outside as fuzzing does: in bounded time and memory, and counted."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tdc_ray.errors import TdcError

MAX_CPU_SECONDS = 10.0
"""Of reading one file of a few kilobytes; beyond it counts as a hang."""

MAX_GROWTH = 64 * 2**20
"""Bytes by which the process may grow for a file of at most 600 kB; measured anew for each."""


@dataclass
class Counts:
    """What came of the files that were read."""

    read: int = 0
    refused: int = 0
    growth_bytes: int = 0
    """The most that the process grew for one of them."""


def refusal(read: Callable[[Path], object], path: Path) -> TdcError | None:
    """Return our error for a file; any other is raised."""
    try:
        read(path)
    except TdcError as error:
        return error
    return None


def check_reading(
    read: Callable[[Path], object], path: Path, counts: Counts, max_growth: int = MAX_GROWTH
) -> None:
    """Check that a file is read or refused, soon and in little memory."""
    before = reset_peak()
    with limited_cpu_time():
        error = refusal(read, path)
    growth = peak_bytes() - before
    if error is None:
        counts.read += 1
    else:
        counts.refused += 1
        assert str(error).strip()
    assert growth <= max_growth
    counts.growth_bytes = max(growth, counts.growth_bytes)


@contextmanager
def recorded(kind: str, contents: Mapping[Path, bytes]) -> Iterator[Counts]:
    """Count files of a kind, and add what came of them to the file ``$FUZZ_RECORD``, if any."""
    counts = Counts()
    started, used = time.perf_counter(), time.process_time()
    yield counts
    if record := os.environ.get("FUZZ_RECORD"):
        row = {
            "kind": kind,
            "files": len(contents),
            "largest_bytes": max(map(len, contents.values())),
            **asdict(counts),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
        }
        with Path(record).open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def limited_cpu_time() -> Iterator[None]:
    """Fail a block that computes for longer than ``MAX_CPU_SECONDS``.

    The system's share is not counted: where a sandbox makes new memory dear, that of the largest
    image that Pillow allows took 8 s. A read that hangs in the system ends by pytest's timeout.
    """

    def fail(_number: int, _frame: object) -> None:
        pytest.fail(f"a file took more than {MAX_CPU_SECONDS:g} s")

    before = signal.signal(signal.SIGVTALRM, fail)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def peak_bytes() -> int:
    """Most memory of this process since :func:`reset_peak`; 0 elsewhere than on Linux."""
    if sys.platform != "linux":
        return 0
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in one)
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Begin to measure the most memory anew, and return what there is now."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()

"""Lets storage and clocks of Python processes fail, when experiments/chaos.py says so by files.

Python imports this module as it starts, from a folder on PYTHONPATH. The files are in the folder
$TDC_RAY_CHAOS: ``disk`` holds the number of the error with which the next write fails, whichever
process it is in, and ``clocks`` the seconds by which the wall clock and the clock of leases are
ahead.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["TDC_RAY_CHAOS"])


def failing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that fails in place of the next call."""

    def call(*arguments: Any) -> Any:
        mine = FOLDER / f"disk-{os.getpid()}"
        try:
            os.rename(FOLDER / "disk", mine)  # noqa: PTH104  one of all processes can
        except FileNotFoundError:
            return function(*arguments)
        number = int(mine.read_text())
        mine.unlink()
        raise OSError(number, os.strerror(number))

    return call


def shifted(function: Callable[..., float], clock: str) -> Callable[..., float]:
    """Return a clock that is ahead."""

    def read(*arguments: Any) -> float:
        try:
            ahead = float(json.loads((FOLDER / "clocks").read_bytes())[clock])
        except FileNotFoundError:
            ahead = 0.0
        return function(*arguments) + ahead

    return read


Path.replace, os.fsync = failing(Path.replace), failing(os.fsync)  # type: ignore[method-assign]
time.time = shifted(time.time, "wall")
time.clock_gettime = shifted(time.clock_gettime, "lease")

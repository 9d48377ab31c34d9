"""Looks at processes of this machine, by /proc: the actors below this one, their memory, files."""

import contextlib
from pathlib import Path

import ray  # noqa: F401  which brings psutil along


def workers() -> list[int]:
    """Return the processes below this one that run items of a pool, or train a base."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith(("ray::_Worker", "ray::RayTrainWorker")):
                found.append(process.pid)
    return sorted(found)


def private_mb(pid: int | str = "self") -> float:
    """Return the memory of a process that no other shares, in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def open_files(pid: int | str = "self") -> int:
    """Return the number of files, sockets and pipes that a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())

"""Which run directories this process may publish files in, and whether it still may.

The process that holds the lease of a run directory, and the workers of that process, check it
before each file appears there. So a driver that lost its lease, or a worker that outlived its
driver, replaces nothing that another one writes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class Fence(Protocol):
    """What stands around a run directory; it can be sent to workers."""

    run_dir: Path
    """Its path without links."""

    def check(self) -> None:
        """Check that files may be published.

        Raises:
            StorageError: Another driver took the run directory over.
        """


_fences: list[Fence] = []


@contextmanager
def fenced(fence: Fence) -> Iterator[None]:
    """Check a fence before every publication within the block."""
    _fences.append(fence)
    try:
        yield
    finally:
        _fences.remove(fence)


def fences() -> tuple[Fence, ...]:
    """Return the fences of this process, for its workers."""
    return tuple(_fences)


def adopt(given: Sequence[Fence]) -> None:
    """Let the fences of a driver be those of this process, its worker, until it ends."""
    _fences[:] = given


def check_fences(path: Path) -> None:
    """Check the fences around a path that is about to be published or removed.

    Raises:
        StorageError: Another driver took the run directory over.
    """
    for fence in _fences:
        if path.parent.resolve().is_relative_to(fence.run_dir):
            fence.check()

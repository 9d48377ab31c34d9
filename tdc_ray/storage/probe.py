"""Tries everything that a run asks of its storage, in a folder of its own."""

import secrets
from collections.abc import Callable
from pathlib import Path

from tdc_ray.errors import StorageError
from tdc_ray.storage.files import exists, listing, read_bytes, remove, write_text
from tdc_ray.storage.lease import LeaseFiles
from tdc_ray.storage.object_store import resolve_path

SHARED_FILE = ".tdc-ray-doctor"
"""Name of a file that one process writes and others look for."""


def probe_storage(folder: str, shared: str | None = None) -> dict[str, str]:
    """Write, read, list, replace, create and remove files.

    Args:
        folder: A path or a URI.
        shared: What another process wrote into ``SHARED_FILE`` there; None means that none did.

    Returns:
        What failed, by what was tried; empty if nothing did.
    """
    root = resolve_path(folder)
    place = root / f"{SHARED_FILE}-{secrets.token_hex(8)}"
    file, leases = place / "file", LeaseFiles(place)
    failed: dict[str, str] = {}

    def attempt(name: str, succeeds: Callable[[], bool], otherwise: str) -> None:
        try:
            if not succeeds():
                failed[name] = otherwise
        except (StorageError, OSError) as error:
            failed[name] = str(error)

    def written(text: str) -> bool:
        write_text(file, text)
        return True

    def removed() -> bool:
        remove(place)
        return not exists(place)

    def reads(text: str, path: Path = file) -> bool:
        return read_bytes(path) == text.encode()

    attempt("write", lambda: written("one"), "")
    if not failed:
        attempt("read", lambda: reads("one"), "another content than was written")
        attempt("list", lambda: listing(place, "*") == [file], "the file is not listed")
        attempt("replace", lambda: written("two") and reads("two"), "the old content is there")
        attempt(
            "create once",
            lambda: (
                leases.is_exclusive and leases.create(1, b"{}") and not leases.create(1, b"{ }")
            ),
            "two drivers could hold one run directory: it lets both create the same file",
        )
    attempt("remove", removed, "it is still there")
    if shared is not None:
        attempt(
            "see what another node wrote",
            lambda: reads(shared, root / SHARED_FILE),
            "another content is there",
        )
    return failed

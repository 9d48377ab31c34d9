"""SHA-256 digests that name content, in hexadecimal digits."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any


def file_digest(path: Path) -> str:
    """Return the digest of a local file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_file_digest(path: Path) -> str:
    """Return the same, computed anew only after size or time of the file changed."""
    stat = path.stat()
    return _cached_file_digest(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)  # drivers and workers ask for every item
def _cached_file_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    return file_digest(path)


def tree_digest(path: Path) -> str:
    """Return a digest of the names and contents of all files below a path but hidden ones.

    That of a single file differs from the digest of its content.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def json_digest(document: Any) -> str:
    """Return the digest of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

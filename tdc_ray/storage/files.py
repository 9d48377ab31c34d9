"""How run directories are read and written: a file or directory that exists is whole.

Paths are local ones, or mirrors of what is in an object store (see
``tdc_ray.storage.object_store``).
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tdc_ray.errors import StorageError, StorageFailedError
from tdc_ray.storage import mirror, object_store
from tdc_ray.storage.fence import check_fences
from tdc_ray.storage.object_store import display_path, is_remote, temporary_path, writer_id

logger = logging.getLogger(__name__)

NOT_JSON = (ValueError, RecursionError)
"""Errors of ``json.loads`` for text that is no JSON, or that is nested too deep."""

_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""Errors of Python, torch and safetensors where a write to a disk fails."""


def exists(path: Path) -> bool:
    """Whether there is a file or folder.

    Raises:
        StorageError: The store of a URI fails.
    """
    return object_store.exists(path) if is_remote(path) else path.exists()


def fetch(path: Path) -> Path:
    """Update the local copy of a URI's content, and return its path; other paths are unchanged.

    What the URI lacks is missing afterwards.

    Raises:
        StorageError: The store of a URI fails.
    """
    if is_remote(path):
        mirror.fetch(path)
    return path


def listing(path: Path, pattern: str) -> list[Path]:
    """Find files and folders below a path as ``Path.glob`` does; sorted.

    Raises:
        StorageError: The store of a URI fails.
    """
    return object_store.listing(path, pattern) if is_remote(path) else sorted(path.glob(pattern))


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there.

    Raises:
        StorageError: The store of a URI fails, or another driver took the run directory over.
    """
    check_fences(path)
    if is_remote(path):
        mirror.remove(path)
    else:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and move what was written there into place.

    Works for a file and for a directory. Whatever was at ``path`` is replaced. The temporary name
    holds host and process, so that two writers never share one. For a URI it is uploaded: a file
    appears when it is complete, those of a directory one by one, ``config.json`` last.

    Raises:
        StorageError: The block wrote nothing, or another driver took the run directory over.
        StorageFailedError: The disk or the store does not take it.
    """
    temporary = temporary_path(path)
    old = path.with_name(f".{path.name}.{writer_id()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        if not temporary.exists():
            raise StorageError(f"nothing was written for {display_path(path)}.")
        _let_others_read(temporary)
        check_fences(path)
        if is_remote(path):
            mirror.upload(temporary, path)
            return
        if temporary.is_dir() or path.is_dir():  # os.replace works on files alone
            with contextlib.suppress(FileNotFoundError):
                path.replace(old)
        temporary.replace(path)
    except _WRITE_ERRORS as error:
        raise _write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # the error that counts is already raised
            _remove(temporary)
            _remove(old)


def _let_others_read(path: Path) -> None:
    """Give files that safetensors wrote for one user alone the permissions of their folder."""
    mode = path.parent.stat().st_mode & 0o666
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(mode | 0o600)


def _write_error(path: Path, error: Exception) -> StorageFailedError:
    """Return an error that names the free space, as errors of libraries on a full disk do not."""
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free on its disk)"
    return StorageFailedError(f"{display_path(path)} cannot be written: {error}{free}.")


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically and through to the disk."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_bytes(path: Path) -> bytes:
    """Read a file as it is now: that of a URI from the store, not from the local copy.

    Raises:
        FileNotFoundError: There is none.
        StorageError: The store of a URI fails.
    """
    return object_store.read(path) if is_remote(path) else path.read_bytes()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: The file is missing or holds no JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise StorageError(f"{display_path(path)} does not exist.") from error
    except NOT_JSON as error:
        raise StorageError(f"{display_path(path)} is not JSON: {error}.") from error


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON document as a line; a torn last line, left by a kill, is first set aside.

    Of a URI, where a store cannot append, a line is an object of its own below the path.

    Raises:
        StorageError: Another driver took the run directory over.
        StorageFailedError: The disk or the store does not take it.
    """
    line = (json.dumps(value) + "\n").encode()
    check_fences(path)
    if is_remote(path):
        object_store.append(path, line)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:  # a buffer would be written again by close()
            file.seek(0)
            content = file.read()
            end = content.rfind(b"\n") + 1
            if end != len(content):
                aside = _set_aside(path, content[end:])
                logger.warning(
                    "the last line of %s is torn: set aside in %s",
                    display_path(path),
                    display_path(aside),
                )
                file.truncate(end)
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise _write_error(path, error) from error


def read_json_lines(path: Path) -> list[Any]:
    """Read every whole line of a JSON-lines file; a file that is missing is empty.

    Lines that are no JSON, as a disk that fails leaves them, are left out with a warning.

    Raises:
        StorageError: The store of a URI fails.
    """
    if is_remote(path):
        lines = object_store.read_entries(path)
    elif path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline there is a torn line
    else:
        return []
    documents = []
    for number, line in enumerate(lines, start=1):
        try:
            documents.append(json.loads(line))
        except NOT_JSON as error:
            logger.warning(
                "line %d of %s is torn: left out (%s)", number, display_path(path), error
            )
    return documents


def cut_at_torn_line(path: Path) -> None:
    """Cut a JSON-lines file at its first line that is torn; all from there on is set aside.

    For a journal, whose later lines mean nothing without the earlier ones. Whoever calls this must
    be its only writer.

    Raises:
        StorageFailedError: The disk does not take it.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    end = 0
    for line in content.splitlines(keepends=True):
        if not _is_whole(line):
            break
        end += len(line)
    if end == len(content):
        return
    aside = _set_aside(path, content[end:])
    with atomic_path(path) as temporary:
        temporary.write_bytes(content[:end])
    logger.warning(
        "%s holds a torn line: it and what comes after it is set aside in %s",
        display_path(path),
        display_path(aside),
    )


def _set_aside(path: Path, part: bytes) -> Path:
    """Write a part of a file into another beside it, and return its path."""
    aside = path.with_name(f"{path.name}.torn-{time.strftime('%Y%m%d-%H%M%S')}")
    with atomic_path(aside) as temporary:
        temporary.write_bytes(part)
    return aside


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except NOT_JSON:
        return False
    return line.endswith(b"\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, a file that is not removed, for the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

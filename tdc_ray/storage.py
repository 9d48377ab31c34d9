"""How run directories are read and written: a file or directory that exists is whole."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdc_ray.errors import StorageError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move what was written there into place.

    Works for a file and for a directory. Whatever stood at ``path`` is replaced. The temporary
    name holds host and process, so that two writers never share one.

    Raises:
        StorageError: The block wrote nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}-{os.getpid()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    old = path.with_name(f".{path.name}.{writer}.old")
    _remove(temporary)
    try:
        yield temporary
        if not temporary.exists():
            raise StorageError(f"nothing was written for {path}.")
        if temporary.is_dir() or path.is_dir():  # a plain replace takes files alone
            with contextlib.suppress(FileNotFoundError):
                path.replace(old)
        temporary.replace(path)
    finally:
        _remove(temporary)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically and through to the disk."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: The file is missing or holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist.") from error
    except ValueError as error:
        raise StorageError(f"{path} is not JSON: {error}.") from error


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON document as a line; a torn last line, left by a kill, is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value) + "\n"
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[Any]:
    """Read every whole line of a JSON-lines file; a file that is missing is empty.

    Raises:
        StorageError: A whole line holds no JSON.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # behind the last newline stands a torn line
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise StorageError(f"{path} holds a line that is not JSON: {error}.") from error


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for one driver; a killed driver's hold ends with it.

    Raises:
        StorageError: Another driver holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / ".lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise StorageError(
                f"run directory {run_dir} is in use by process {file.read() or '(unknown)'}: "
                "wait for it, stop it, or choose another --run-dir."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for ``path``, a file that stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

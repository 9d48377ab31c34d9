"""Local copies of what is in an object store, shared by all processes of a node.

Copies lie in the mirror of the URI (see ``tdc_ray.storage.object_store``). What is known of each
one, the version that it is a copy of, is in a file of the same path below ``tdc_ray-marks``, which
is its lock too.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tdc_ray.errors import StorageError
from tdc_ray.storage.object_store import (
    MIRROR,
    ROOT_VARIABLE,
    Info,
    exists,
    filesystem,
    find,
    is_remote,
    put,
    temporary,
    translate_errors,
    version_of,
)

SECONDS_BETWEEN_UPLOADS = 5.0
"""How old what the store has of a growing file may be."""

logger = logging.getLogger(__name__)


def fetch(path: Path) -> None:
    """Make the local copy of a file or folder what the store has; what it lacks goes.

    A version of a file is downloaded once on a node, however many processes ask for it.

    Raises:
        StorageError: The store does not give it.
    """
    with translate_errors(path, "read"):
        found = find(path)
        for name, info in found.items():
            _download(path / name, info)
        for name in _copies(path) - found.keys():
            with CachedFile(path / name) as known:  # it may have been written since
                if not exists(path / name):
                    known.forget()


def upload(source: Path, path: Path) -> None:
    """Put a local file or folder, which is used up, in place of whatever stands at a path.

    A file is seen when it is whole. The files of a folder go up one by one: JSON, which readers
    look for first, last, and ``config.json`` after all others beside it.

    Raises:
        StorageError: The store does not take it.
    """
    if source.is_file():
        _upload(source, path)
        return
    remove(path)
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    for file in sorted(files, key=_order):
        _upload(source / file, path / file)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there; what readers look for first goes first.

    Raises:
        StorageError: The store does not do it.
    """
    store, _ = filesystem(path)
    with translate_errors(path, "removed"):
        found = find(path)
        for name in sorted(found, key=lambda name: _order(Path(name)), reverse=True):
            store.rm_file(found[name]["name"])
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it too
    else:
        path.unlink(missing_ok=True)


@contextmanager
def synced_while_growing(path: Path) -> Iterator[Path]:
    """Give a place for files that grow, such as logs, and keep them in the store meanwhile.

    It is the path itself where that is no mirror. Otherwise it is a folder of this process's own,
    whose files are uploaded into the path every few seconds and at the end.
    """
    if not is_remote(path):
        yield path
        return
    done = threading.Event()
    with tempfile.TemporaryDirectory(dir=_own(path)) as name:
        folder, sent = Path(name), dict[Path, tuple[int, int]]()

        def watch() -> None:
            while not done.wait(SECONDS_BETWEEN_UPLOADS):
                _send_grown(folder, path, sent)

        thread = threading.Thread(target=watch, name="upload", daemon=True)
        thread.start()
        try:
            yield folder
        finally:
            done.set()
            thread.join()
            _send_grown(folder, path, sent)


def _send_grown(folder: Path, path: Path, sent: dict[Path, tuple[int, int]]) -> None:
    """Upload the files that changed; a store that fails is asked again the next time."""
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        state = _state(file)
        if sent.get(file) == state:
            continue
        try:
            put(file, path / file.relative_to(folder))
        except StorageError as error:
            logger.warning("%s", error)
            return
        sent[file] = state


def _copies(path: Path) -> set[str]:
    """Name the files below a path that are no temporary ones, relative to it; "" is itself."""
    if path.is_file():
        return {""}
    names = set()
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(folder).relative_to(path)
        names |= {(inside / name).as_posix() for name in files if not name.startswith(".")}
    return names


def _order(file: Path) -> tuple[bool, int, bool, str]:
    """Bring what readers look for first to the end."""
    return (file.suffix == ".json", -len(file.parts), file.name == "config.json", file.name)


def _download(path: Path, info: Info) -> None:
    store, key = filesystem(path)
    with CachedFile(path) as known:
        while known.version != version_of(info):
            with known.temporary() as temporary:
                store.get_file(key, str(temporary))
                after = store.info(key)
                if version_of(after) == version_of(info):  # else it was replaced meanwhile
                    known.replace(temporary, version_of(info))
                info = after


def _upload(source: Path, path: Path) -> None:
    store, key = filesystem(path)
    size = source.stat().st_size
    with CachedFile(path) as known:
        known.forget()
        put(source, path)
        with translate_errors(path, "written"):
            info = store.info(key)
        if info["size"] == size:  # else another writer was quicker
            known.replace(source, version_of(info))


class CachedFile:
    """The local copy of a file and what is known of it, for one process of the node at a time."""

    def __init__(self, path: Path) -> None:
        _own(path)
        self.path = path
        self._mark = Path(*["tdc_ray-marks" if part == MIRROR else part for part in path.parts])
        self._file: IO[str]

    def __enter__(self) -> "CachedFile":
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._mark.open("a+")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def version(self) -> str | None:
        """The version of which it is a copy; None: it is none, or was changed since."""
        self._file.seek(0)
        try:
            version, state = json.loads(self._file.read())
            return str(version) if tuple(state) == _state(self.path) else None
        except (ValueError, OSError):
            return None

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """Give a hidden place beside it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        path = temporary(self.path)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def replace(self, source: Path, version: str) -> None:
        """Take a file as the copy of a version."""
        self.forget()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        source.replace(self.path)
        self._file.write(json.dumps([version, _state(self.path)]))
        self._file.flush()

    def forget(self) -> None:
        """Remove the copy."""
        self._file.truncate(0)
        self.path.unlink(missing_ok=True)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _own(path: Path) -> Path:
    """Make the folder that a mirror lies in and give it; nobody else may write there.

    Raises:
        StorageError: It is another user's.
    """
    root = Path(*path.parts[: path.parts.index(MIRROR)])
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise StorageError(f"{root} must be this user's own. Name another by {ROOT_VARIABLE}.")
    return root

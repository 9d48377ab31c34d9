"""Local copies of what is in an object store, shared by all processes of a node.

Copies are in the mirror of the URI (see ``tdc_ray.storage.object_store``). The version of each
copy is recorded in a file of the same path below ``tdc_ray-marks``, which is its lock too.

fsspec's ``filecache`` does less: it downloads over the very file that others read (of three
processes that read a file while it is replaced, each got a torn one in 30 reads), once per
process, believes a copy that was changed by hand, and downloads again what was just written.
"""

import fcntl
import glob
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
    find,
    is_remote,
    opened_store,
    put,
    temporary_path,
    version_of,
)

SECONDS_BETWEEN_UPLOADS = 5.0
"""Greatest age of the store's version of a growing file."""

logger = logging.getLogger(__name__)


def fetch(path: Path) -> None:
    """Update the local copy of a file or folder from the store; files that it lacks are removed.

    A version of a file is downloaded once on a node, however many processes ask for it.

    Raises:
        StorageError: The store fails.
    """
    with opened_store(path, "read"):
        infos = find(path)
        for name, info in infos.items():
            _download(path / name, info)
        for name in _copies(path) - infos.keys():
            with CachedFile(path / name) as copy:
                if not exists(path / name):  # it may have been written since
                    copy.forget()


def upload(source: Path, path: Path) -> None:
    """Move a local file or folder to a path in the store, replacing whatever is there.

    A file appears when it is complete. The files of a folder appear one by one: JSON, which
    readers look for first, last, and ``config.json`` after all others beside it.

    Raises:
        StorageError: The store fails.
    """
    if source.is_file():
        _upload(source, path)
        return
    remove(path)
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    for file in sorted(files, key=_upload_order):
        _upload(source / file, path / file)


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists; what readers look for first is removed first.

    Raises:
        StorageError: The store fails.
    """
    with opened_store(path, "removed") as (store, _):
        infos = find(path)
        for name in sorted(infos, key=lambda name: _upload_order(Path(name)), reverse=True):
            store.rm_file(infos[name]["name"])
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another process may be removing it too
    else:
        path.unlink(missing_ok=True)


def _upload_order(file: Path) -> tuple[bool, int, bool, str]:
    return (file.suffix == ".json", -len(file.parts), file.name == "config.json", file.name)


@contextmanager
def synced_while_growing(path: Path) -> Iterator[Path]:
    """Yield a path for files that grow, such as logs, and upload them meanwhile.

    It is the path itself unless that is a mirror. Otherwise it is a temporary folder, whose files
    are uploaded into the path every few seconds and at the end.
    """
    if not is_remote(path):
        yield path
        return
    done = threading.Event()
    with tempfile.TemporaryDirectory(dir=_ensure_private_root(path)) as name:
        folder, uploaded = Path(name), dict[Path, tuple[int, int]]()

        def watch() -> None:
            while not done.wait(SECONDS_BETWEEN_UPLOADS):
                _upload_grown(folder, path, uploaded)

        thread = threading.Thread(target=watch, name="upload", daemon=True)
        thread.start()
        try:
            yield folder
        finally:
            done.set()
            thread.join()
            _upload_grown(folder, path, uploaded)


def _upload_grown(folder: Path, path: Path, uploaded: dict[Path, tuple[int, int]]) -> None:
    """Upload the files that changed; after an error they are uploaded the next time."""
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        state = _state(file)
        if uploaded.get(file) != state:
            try:
                put(file, path / file.relative_to(folder))
            except StorageError as error:
                logger.warning("%s", error)
                return
            uploaded[file] = state


def _copies(path: Path) -> set[str]:
    """Find the files below a path but hidden ones, relative to it; "" is the path itself."""
    if path.is_file():
        return {""}
    # Path.rglob fails where another process removes a folder meanwhile.
    names = glob.glob("**", root_dir=path, recursive=True)  # noqa: PTH207
    return {name for name in names if (path / name).is_file()}


def _download(path: Path, info: Info) -> None:
    temporary = temporary_path(path)
    with CachedFile(path) as copy, opened_store(path, "read") as (store, key):
        try:
            while copy.version != version_of(info):
                path.parent.mkdir(parents=True, exist_ok=True)
                store.get_file(key, str(temporary))
                before, info = info, store.info(key)
                if version_of(info) == version_of(before):  # else it was replaced meanwhile
                    copy.replace(temporary, version_of(info))
        finally:
            temporary.unlink(missing_ok=True)


def _upload(source: Path, path: Path) -> None:
    size = source.stat().st_size
    with CachedFile(path) as copy:
        copy.forget()
        put(source, path)
        with opened_store(path, "written") as (store, key):
            info = store.info(key)
        if info["size"] == size:  # else another writer was quicker
            copy.replace(source, version_of(info))


class CachedFile:
    """The local copy of a file with its mark, for one process of the node at a time."""

    def __init__(self, path: Path) -> None:
        _ensure_private_root(path)
        self.path = path
        self._mark_path = Path(*("tdc_ray-marks" if p == MIRROR else p for p in path.parts))
        self._mark: IO[str]

    def __enter__(self) -> "CachedFile":
        self._mark_path.parent.mkdir(parents=True, exist_ok=True)
        self._mark = self._mark_path.open("a+")
        fcntl.flock(self._mark, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark.close()

    @property
    def version(self) -> str | None:
        """The version that it is a copy of; None means that there is none, or it was changed."""
        self._mark.seek(0)
        try:
            version, state = json.loads(self._mark.read())
            return str(version) if tuple(state) == _state(self.path) else None
        except (ValueError, OSError):
            return None

    def replace(self, source: Path, version: str) -> None:
        """Move a file to its path, as the copy of a version."""
        self.forget()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        source.replace(self.path)
        self._mark.write(json.dumps([version, _state(self.path)]))
        self._mark.flush()

    def forget(self) -> None:
        """Remove the copy."""
        self._mark.truncate(0)
        self.path.unlink(missing_ok=True)


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _ensure_private_root(path: Path) -> Path:
    """Return the folder of a mirror, created if missing; no other user may write there.

    Raises:
        StorageError: It is another user's.
    """
    root = Path(*path.parts[: path.parts.index(MIRROR)])
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise StorageError(f"{root} must be this user's own. Name another by {ROOT_VARIABLE}.")
    return root

"""Paths in an object store, such as ``s3://bucket/prefix``: every node works on a mirror of them.

The mirror of a URI is a local path that holds the URI, ``.../tdc_ray-mirror/s3/bucket/prefix``. So
any process tells what a path is the mirror of, and it means the same on every node. A mirror is a
cache: what exists is asked of the store, and a local copy counts only as long as the store has
the version that it is a copy of. Credentials and the store's address come from the environment
alone (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` and so on).
"""

import functools
import itertools
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdc_ray.errors import StorageError, StorageFailedError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # imported where it is needed: local paths do without

ROOT_VARIABLE = "TDC_RAY_MIRROR"
"""Environment variable: the folder of this node's mirrors."""

MIRROR = "tdc_ray-mirror"
"""The part of a path that makes it a mirror; kind of store, bucket and the rest are behind it."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*))?", re.DOTALL)
_TEMPORARY = re.compile(r"\..+\.tmp")
_LOCAL = ("file", "local")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_OBJECT_STORES = (*_EXTRAS, "abfs", "abfss", "az")

Info = Mapping[str, Any]
"""What a store tells of a file."""


def resolve_path(path: Path | str) -> Path:
    """Give where a path that a user names is worked on: of a URI its mirror, else itself.

    Raises:
        StorageError: The URI names no place, or is of a kind that is unknown or not installed.
    """
    match = _URI.fullmatch(str(path))  # a Path of a URI has lost some of its slashes
    if match is None:
        return Path(path)
    scheme, rest = match[1].lower(), (match[2] or "").strip("/")
    if scheme in _LOCAL:
        return Path("/", rest)
    parts = rest.split("/")
    if not rest or ":" in parts[0] or "?" in rest or {".", ".."} & set(parts):
        raise StorageError(
            f"a URI must be {scheme}://BUCKET/PREFIX, without ?, . or .. in it and without keys: "
            "these and the store's address come from the environment alone."
        )
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(scheme)
    except ValueError as error:
        raise StorageError(
            f"{scheme}://{rest} is of a kind that is not known here. Use a path, s3:// or gs://."
        ) from error
    except ImportError as error:
        extra = f" (pip install 'tdc-ray[{_EXTRAS[scheme]}]')" if scheme in _EXTRAS else ""
        raise StorageError(f"{scheme}://{rest} cannot be used: {error}{extra}.") from error
    default = Path(tempfile.gettempdir(), f"tdc_ray-{os.getuid()}")
    root = Path(os.environ.get(ROOT_VARIABLE, default)).resolve()
    return root / MIRROR / scheme / rest


def is_remote(path: Path) -> bool:
    """Whether a path is the mirror of a URI; what is being written, file by file, is none yet."""
    if MIRROR not in path.parts:
        return False
    return not any(map(_TEMPORARY.fullmatch, path.parts[path.parts.index(MIRROR) :]))


def temporary(path: Path) -> Path:
    """Give a hidden path beside another for what this process writes there."""
    return path.with_name(f".{path.name}.{writer_id()}.tmp")


def display_path(path: Path | str) -> str:
    """Give the URI of a mirror, to be shown to a user; of other paths their text."""
    path = resolve_path(path)
    if not is_remote(path):
        return str(path)
    place = path.parts.index(MIRROR) + 1
    return f"{path.parts[place]}://{'/'.join(path.parts[place + 1 :])}"


def filesystem(path: Path) -> tuple["AbstractFileSystem", str]:
    """Give the store of a mirror's URI, and the path within it."""
    from fsspec.core import url_to_fs

    uri = display_path(path)
    scheme = uri.partition(":")[0]
    options: dict[str, Any] = {"use_listings_cache": False} if scheme in _OBJECT_STORES else {}
    if _EXTRAS.get(scheme) == "s3":  # a minute, the default, is longer than a lease lasts
        options["config_kwargs"] = {"connect_timeout": 5, "read_timeout": 20}
    store, key = url_to_fs(uri, **options)
    return store, key


def exists(path: Path) -> bool:
    """Ask the store whether there is a file or a folder."""
    store, key = filesystem(path)
    with translate_errors(path, "read"):
        try:
            store.info(key)
        except FileNotFoundError:
            return False
        return True


def version(path: Path) -> str:
    """Name the content of a file; the name changes when it does."""
    store, key = filesystem(path)
    with translate_errors(path, "read"):
        return version_of(store.info(key))


def read(path: Path) -> bytes:
    """Read a file from the store.

    Raises:
        FileNotFoundError: There is none.
        StorageError: The store does not give it.
    """
    store, key = filesystem(path)
    with translate_errors(path, "read"):
        content: bytes = store.cat_file(key)
        return content


def read_entries(path: Path) -> list[bytes]:
    """Read what :func:`append` wrote, in its order."""
    store, _ = filesystem(path)
    with translate_errors(path, "read"):
        names = [str(info["name"]) for _, info in sorted(find(path).items())]
        contents = store.cat(names) if names else {}
        return [contents[name] for name in names]


def append(path: Path, content: bytes) -> None:
    """Add an entry to a list of entries: an object of its own below the path, numbered.

    Of writers that add at the same time each keeps its own order.
    """
    store, key = filesystem(path)
    with translate_errors(path, "written"):
        number = next(_numbers(path, os.getpid()))
        store.pipe_file(f"{key}/{number:06d}-{writer_id()}.json", content)


@functools.lru_cache(maxsize=1024)  # a list may grow long, and is looked through once
def _numbers(path: Path, _pid: int) -> Iterator[int]:
    found = [int(name.partition("-")[0]) for name in find(path)]
    return itertools.count(max(found, default=-1) + 1)


def write(path: Path, content: bytes) -> None:
    """Write a small file straight into the store, past the mirror."""
    store, key = filesystem(path)
    with translate_errors(path, "written"):
        store.pipe_file(key, content)


def put(source: Path, path: Path) -> None:
    """Upload a file, which is seen when it is whole."""
    store, key = filesystem(path)
    with translate_errors(path, "written"):
        if display_path(path).partition(":")[0] in _OBJECT_STORES:
            store.put_file(str(source), key)
            return
        hidden = str(temporary(Path(key)))
        store.makedirs(str(Path(key).parent), exist_ok=True)
        store.put_file(str(source), hidden)
        store.mv(hidden, key)


def listing(path: Path, pattern: str) -> list[Path]:
    """Find files and folders below a path, as ``Path.glob`` does, sorted."""
    from fsspec.utils import glob_translate

    matches = re.compile(glob_translate(pattern)).match
    with translate_errors(path, "read"):
        below = {Path(name) for name in find(path) if name}
    below |= {folder for file in below for folder in file.parents if folder.name}
    return sorted(path / found for found in below if matches(found.as_posix()))


def writer_id() -> str:
    """Name this process among all that write to a run directory."""
    return f"{socket.gethostname()}-{os.getpid()}"


def find(path: Path) -> dict[str, Info]:
    """Give the store's files below a path by their names relative to it; "" is the path itself."""
    store, key = filesystem(path)
    try:
        found: dict[str, Info] = store.find(key, detail=True)
    except FileNotFoundError:  # not even the bucket
        return {}
    infos = {name: info or store.info(name) for name, info in found.items()}
    return {
        name.removeprefix(key).strip("/"): info
        for name, info in infos.items()
        if not name.endswith("/")  # what some tools make in place of a folder
        and info.get("type") != "directory"  # the path, if its first file came meanwhile
    }


def version_of(info: Info) -> str:
    """Name the content that a store tells of."""
    tag = info.get("ETag") or info.get("etag")
    times = [info.get(name) for name in ("LastModified", "mtime", "updated", "created")]
    return f"{info['size']} {tag or times}"


@contextmanager
def translate_errors(path: Path, done: str) -> Iterator[None]:
    """Say of any error what could not be done; a file that is missing is told as such."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        if done == "read":
            raise
        raise StorageFailedError(f"{display_path(path)} cannot be {done}: {error}.") from error
    except Exception as error:  # every store has errors of its own
        raise StorageFailedError(f"{display_path(path)} cannot be {done}: {error}.") from error

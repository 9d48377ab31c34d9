"""Paths in an object store, such as ``s3://bucket/prefix``: every node works on a mirror of them.

The mirror of a URI is a local path that holds the URI, ``.../tdc_ray-mirror/s3/bucket/prefix``. So
any process knows what a path mirrors, and it means the same on every node. A mirror is a cache:
the store decides what exists, and a local copy is valid only as long as the store has the same
version. Credentials and the store's address come from the environment alone
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` and so on).
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
from typing import TYPE_CHECKING, Any, NamedTuple

from tdc_ray.errors import StorageError, StorageFailedError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # imported where it is needed: local paths do without

ROOT_VARIABLE = "TDC_RAY_MIRROR"
"""Environment variable: the folder of this node's mirrors."""

MIRROR = "tdc_ray-mirror"
"""The part of a path that makes it a mirror; scheme, bucket and the rest follow it."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+(.*))?", re.DOTALL)
_TEMPORARY = re.compile(r"\..+\.tmp")

Info = Mapping[str, Any]
"""A store's information on a file."""


class Backend(NamedTuple):
    """An object store: what is uploaded to it appears when it is whole."""

    extra: str | None
    """The extra in ``pyproject.toml`` that installs it."""

    options: Mapping[str, Any] = {}
    """Options of its fsspec file system."""

    is_exclusive: bool = False
    """Whether of several processes that create an object at once one alone can: by
    ``If-None-Match`` on S3, by ``ifGenerationMatch`` on GCS."""


_S3 = Backend(
    "s3", {"config_kwargs": {"connect_timeout": 5, "read_timeout": 20}}, is_exclusive=True
)
"""The default, a minute, is longer than a lease is valid."""

BACKENDS = {
    "s3": _S3,
    "s3a": _S3,
    "gs": Backend("gcs", is_exclusive=True),
    "gcs": Backend("gcs", is_exclusive=True),
    "abfs": Backend(None),
    "abfss": Backend(None),
    "az": Backend(None),
}
"""Object stores by scheme. Other schemes of fsspec are file systems, where a file appears whole
because it is moved into place."""


def resolve_path(path: Path | str) -> Path:
    """Return the local path of what a user names: a URI's mirror, else the path itself.

    A leading ``~`` is the home folder, and part of the name where there is no such user.

    Raises:
        StorageError: The URI is incomplete, or its scheme is unknown or not installed.
    """
    match = _URI.fullmatch(str(path))  # a Path of a URI has lost some of its slashes
    if match is None:
        return Path(os.path.expanduser(path))  # noqa: PTH111 Path's own raises for unknown users
    scheme, rest = match[1].lower(), (match[2] or "").strip("/")
    if scheme in ("file", "local"):
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
        extra = BACKENDS[scheme].extra if scheme in BACKENDS else None
        install = f" (pip install 'tdc-ray[{extra}]')" if extra else ""
        raise StorageError(f"{scheme}://{rest} cannot be used: {error}{install}.") from error
    default = Path(tempfile.gettempdir(), f"tdc_ray-{os.getuid()}")
    return Path(os.environ.get(ROOT_VARIABLE, default)).resolve() / MIRROR / scheme / rest


def is_remote(path: Path) -> bool:
    """Whether a path is the mirror of a URI; temporary paths of files being written are not."""
    if MIRROR not in path.parts:
        return False
    return not any(map(_TEMPORARY.fullmatch, path.parts[path.parts.index(MIRROR) :]))


def temporary_path(path: Path) -> Path:
    """Return a hidden temporary path beside another, for this process."""
    return path.with_name(f".{path.name}.{writer_id()}.tmp")


def writer_id() -> str:
    """Return this process's name among all that write to a run directory."""
    return f"{socket.gethostname()}-{os.getpid()}"


def display_path(path: Path | str) -> str:
    """Return the text of a path for a user: a mirror's URI, else the path."""
    path = resolve_path(path)
    if not is_remote(path):
        return str(path)
    scheme, *rest = path.parts[path.parts.index(MIRROR) + 1 :]
    return f"{scheme}://{'/'.join(rest)}"


def filesystem(path: Path) -> tuple["AbstractFileSystem", str]:
    """Return the store of a mirror's URI, and the path within it."""
    from fsspec.core import url_to_fs

    uri, options = display_path(path), {}
    if backend := BACKENDS.get(uri.partition(":")[0]):
        # A cached listing would hide what other nodes write.
        options = {"use_listings_cache": False, **backend.options}
    store, key = url_to_fs(uri, **options)
    return store, key


@contextmanager
def opened_store(path: Path, action: str) -> Iterator[tuple["AbstractFileSystem", str]]:
    """Yield the same, and raise any error of the store as one that names what failed.

    Raises:
        FileNotFoundError: There is nothing to be read.
        StorageFailedError: Anything else went wrong.
    """
    try:
        yield filesystem(path)
    except StorageError:
        raise
    except Exception as error:  # every store has its own errors
        if isinstance(error, FileNotFoundError) and action == "read":
            raise
        raise StorageFailedError(f"{display_path(path)} cannot be {action}: {error}.") from error


def exists(path: Path) -> bool:
    """Whether the store has a file or a folder."""
    try:
        with opened_store(path, "read") as (store, key):
            store.info(key)  # s3fs's exists() returns False where a bucket does not answer
    except FileNotFoundError:
        return False
    return True


def version(path: Path) -> str:
    """Return a name of a file's content, which changes when that does."""
    with opened_store(path, "read") as (store, key):
        return version_of(store.info(key))


def version_of(info: Info) -> str:
    """Return the same from the store's information on the file."""
    tag = info.get("ETag") or info.get("etag")
    times = [info.get(name) for name in ("LastModified", "mtime", "updated", "created")]
    return f"{info['size']} {tag or times}"


def read(path: Path) -> bytes:
    """Read a file from the store.

    Raises:
        FileNotFoundError: There is none.
        StorageError: The store fails.
    """
    with opened_store(path, "read") as (store, key):
        content: bytes = store.cat_file(key)
        return content


def write(path: Path, content: bytes) -> None:
    """Write a small file directly to the store, without the mirror."""
    with opened_store(path, "written") as (store, key):
        store.pipe_file(key, content)


def creates_exclusively(path: Path) -> bool:
    """Whether of several processes that :func:`create` a file at once one alone can."""
    backend = BACKENDS.get(display_path(path).partition(":")[0])
    return backend is not None and backend.is_exclusive


def create(path: Path, content: bytes) -> bool:
    """Create a small file unless there is one; return whether this content is there.

    Raises:
        StorageError: The store fails.
    """
    with opened_store(path, "written") as (store, key):
        try:
            store.pipe_file(key, content, mode="create")
        except Exception:  # each store has its own refusal; or it was done, and the reply is lost
            try:
                return bool(store.cat_file(key) == content)
            except FileNotFoundError:
                pass
            raise
        return True


def put(source: Path, path: Path) -> None:
    """Upload a file, which appears when it is complete."""
    with opened_store(path, "written") as (store, key):
        if display_path(path).partition(":")[0] in BACKENDS:
            store.put_file(str(source), key)
            return
        hidden = str(temporary_path(Path(key)))
        store.makedirs(str(Path(key).parent), exist_ok=True)
        store.put_file(str(source), hidden)
        store.mv(hidden, key)


def append(path: Path, content: bytes) -> None:
    """Add an entry to a list of entries: an object of its own below the path, numbered.

    Of writers that add at the same time each keeps its own order.
    """
    with opened_store(path, "written") as (store, key):
        number = next(_numbers(path, os.getpid()))
        store.pipe_file(f"{key}/{number:06d}-{writer_id()}.json", content)


@functools.lru_cache(maxsize=1024)  # a list may grow long, and is searched once
def _numbers(path: Path, _pid: int) -> Iterator[int]:
    last = max((int(name.partition("-")[0]) for name in find(path)), default=-1)
    return itertools.count(last + 1)


def read_entries(path: Path) -> list[bytes]:
    """Read what :func:`append` wrote, in its order."""
    with opened_store(path, "read") as (store, _):
        names = [info["name"] for _, info in sorted(find(path).items())]
        contents = store.cat(names) if names else {}
        return [contents[name] for name in names]


def find(path: Path) -> dict[str, Info]:
    """Find the store's files below a path, by names relative to it; "" is the path itself."""
    store, key = filesystem(path)
    try:
        infos = store.find(key, detail=True)
    except FileNotFoundError:  # not even the bucket
        return {}
    infos = {name: info or store.info(name) for name, info in infos.items()}
    return {
        name.removeprefix(key).strip("/"): info
        for name, info in infos.items()
        if not name.endswith("/")  # some tools create this in place of a folder
        and info.get("type") != "directory"  # the path, if its first file came meanwhile
    }


def listing(path: Path, pattern: str) -> list[Path]:
    """Find files and folders below a path as ``Path.glob`` does; sorted."""
    from fsspec.utils import glob_translate  # store.glob reads brackets of the path as a pattern

    matches = re.compile(glob_translate(pattern)).match
    with opened_store(path, "read"):
        below = {Path(name) for name in find(path) if name}
    below |= {folder for file in below for folder in file.parents if folder.name}
    return sorted(path / name for name in below if matches(name.as_posix()))

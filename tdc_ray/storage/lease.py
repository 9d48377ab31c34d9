"""One driver per run directory: a lock on this machine, and a lease for drivers elsewhere.

A lease is a file that its holder writes again every few seconds. One that no longer changes was
left by a driver that was killed, and is taken over.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tdc_ray.errors import StorageError
from tdc_ray.storage import object_store
from tdc_ray.storage.files import read_bytes, remove
from tdc_ray.storage.object_store import display_path, is_remote

LOCK_FILE = ".lock"
LEASE_FILE = ".lease.json"

RENEWED_EVERY_S = 2.0
STALE_AFTER_S = 8.0
"""A lease that did not change for so long is taken over."""

SETTLED_AFTER_S = 1.0
"""Time after which the last of several drivers that write a lease at once holds it."""

RESENT_EVERY_S = 0.5
"""Time between two signals to the main thread, until it is interrupted."""

_STOP = getattr(signal, "SIGRTMIN", signal.SIGUSR2) + 11
"""Signal by which the thread that renews a lease interrupts the main one; unused otherwise."""

_SIZE = 512
"""Bytes of every lease, since a file is changed in place."""

Document = dict[str, Any]

logger = logging.getLogger(__name__)


@contextmanager
def hold_lease(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for one driver; a killed driver's hold ends with it, or soon after.

    Raises:
        StorageError: Another driver holds it, or took it over because this one was suspended or
            without access to the storage for long.
    """
    with nullcontext() if is_remote(run_dir) else _locked_here(run_dir):
        lease = _Lease(run_dir)
        lease.acquire()
        with lease.interrupts_main_thread():
            thread = threading.Thread(target=lease.renew, name="lease", daemon=True)
            thread.start()
            try:
                yield
            except KeyboardInterrupt:
                if lease.lost_to is None:
                    raise
            finally:
                lease.over.set()
                thread.join()
                lease.release()


def lease_holder(run_dir: Path) -> str | None:
    """Return the name of the driver that holds a run directory, or held it until it was killed.

    Raises:
        StorageError: The store of a URI fails.
    """
    document = _read(run_dir / LEASE_FILE)
    if not document:
        return None
    return f"{_name(document)}, which is gone" if _is_gone(document) else _name(document)


@contextmanager
def _locked_here(run_dir: Path) -> Iterator[None]:
    """Hold the lock against drivers on this machine; it ends with the process."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _in_use(run_dir, f"process {file.read() or '(unknown)'}") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class _Lease:
    """This process's lease of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / LEASE_FILE
        self.over = threading.Event()
        self.lost_to: str | None = None
        """The driver that took it over."""
        self._document: Document = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": _pid_namespace(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "id": secrets.token_hex(8),
            "count": 0,
        }
        self._main_thread: int | None = None
        self._interrupted = False

    def acquire(self) -> None:
        """Write the lease where there is none, or a stale one.

        Raises:
            StorageError: It is another driver's.
        """
        if not is_remote(self.path):
            with contextlib.suppress(FileExistsError):  # of several drivers one creates the file
                self.path.touch(exist_ok=False)
                self._write()
                return
        before = _read(self.path)
        deadline = time.monotonic() + STALE_AFTER_S
        while before is not None and not _is_gone(before) and time.monotonic() < deadline:
            time.sleep(SETTLED_AFTER_S)
            if (now := _read(self.path)) != before:
                if now is None:  # it was released
                    break
                raise _in_use(self.run_dir, _name(now))
        self._write()
        if before is not None and _is_gone(before) and not is_remote(self.path):
            return  # the lock keeps others on this machine out
        time.sleep(SETTLED_AFTER_S)
        now = _read(self.path) or {}
        if not self._owns(now):
            raise _in_use(self.run_dir, _name(now))

    def renew(self) -> None:
        """Renew it periodically; stop the process if another driver took it over."""
        failing = False
        while not self.over.wait(RENEWED_EVERY_S):
            try:
                document = _read(self.path)
                if document and not self._owns(document):
                    self.lost_to = _name(document)
                    logger.error("%s", self._lost_error())
                    self._interrupt_main_thread()
                    return
                self._write()
                failing = False
            except (StorageError, OSError) as error:  # it may come back before the lease is stale
                if not failing:
                    logger.warning("the lease of %s: %s", display_path(self.run_dir), error)
                failing = True

    def release(self) -> None:
        """Remove it.

        Raises:
            StorageError: Another driver took it over.
        """
        if self.lost_to is not None:
            raise self._lost_error()
        with contextlib.suppress(StorageError, OSError):  # it will be stale soon
            if self._owns(_read(self.path) or {}):
                remove(self.path)

    @contextmanager
    def interrupts_main_thread(self) -> Iterator[None]:
        """Make the loss of the lease interrupt the main thread, as Ctrl-C does."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python's signals reach the main thread alone: this block runs to its end
            return

        def interrupt(*_: object) -> None:
            if not self._interrupted:  # once: a second one would interrupt the cleanup
                self._interrupted = True
                raise KeyboardInterrupt  # which ends Ray's waiting too

        before = signal.signal(_STOP, interrupt)
        self._main_thread = threading.get_ident()
        try:
            yield
        finally:
            signal.signal(_STOP, before)

    def _interrupt_main_thread(self) -> None:
        """Signal until it works: a signal just before a blocking call does not interrupt that."""
        while self._main_thread and not self._interrupted and not self.over.is_set():
            signal.pthread_kill(self._main_thread, _STOP)
            self.over.wait(RESENT_EVERY_S)

    def _owns(self, document: Document) -> bool:
        return bool(document.get("id") == self._document["id"])

    def _write(self) -> None:
        self._document["count"] += 1
        content = json.dumps(self._document).encode().ljust(_SIZE)
        if is_remote(self.path):
            object_store.write(self.path, content)
            return
        # In place: NFS clients may cache a name's file for longer than a file's content.
        with os.fdopen(os.open(self.path, os.O_CREAT | os.O_WRONLY), "wb") as file:
            file.write(content)

    def _lost_error(self) -> StorageError:
        return StorageError(
            f"run directory {display_path(self.run_dir)} was taken over by {self.lost_to}: this "
            "process was suspended, or cut off from the storage, for too long. It stops here and "
            "the other one continues."
        )


def _read(path: Path) -> Document | None:
    """Read a lease; None means that there is none, empty that it is just being written."""
    try:
        document = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _name(document: Document) -> str:
    pid, host, started = (document.get(key, "(unknown)") for key in ("pid", "host", "started"))
    return f"process {pid} on host {host} (started {started})"


def _in_use(run_dir: Path, holder: str) -> StorageError:
    return StorageError(
        f"run directory {display_path(run_dir)} is in use by {holder}: wait for it, stop it, or "
        "choose another --run-dir."
    )


def _is_gone(document: Document) -> bool:
    """Whether the holder is a process of this machine that no longer exists."""
    if not document or document.get("processes") != _pid_namespace():
        return False
    try:
        os.kill(int(document["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False


def _pid_namespace() -> str:
    """Return a name of the process namespace: a machine since its boot, or a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)  # unknown: equal to no other

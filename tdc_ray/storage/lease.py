"""One driver per run directory: a lock on this machine, and a lease that drivers elsewhere see.

A lease is a file that its holder writes again every few seconds. One that stays as it is was left
behind by a driver that was killed, and is taken over.
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tdc_ray.errors import StorageError
from tdc_ray.storage import object_store
from tdc_ray.storage.files import remove
from tdc_ray.storage.object_store import display_path, is_remote

LOCK_FILE = ".lock"
LEASE_FILE = ".lease.json"

RENEWED_EVERY_S = 2.0
STALE_AFTER_S = 8.0
"""A lease that did not change for so long was left behind."""

SETTLED_AFTER_S = 1.0
"""Of drivers that write a lease at the same time, the last one has it after that time."""

RESENT_EVERY_S = 0.5
"""The main thread is signalled again after that time, until it hears it."""

_STOP = getattr(signal, "SIGRTMIN", signal.SIGUSR2) + 11
"""How the thread that renews a lease stops the main one: a signal that nobody else uses."""

_SIZE = 512
"""Bytes of a lease: all have as many, for a file is changed in place."""

logger = logging.getLogger(__name__)


@contextmanager
def hold_lease(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for one driver; a killed driver's hold ends with it, or soon after.

    Raises:
        StorageError: Another driver holds it, or took it over because this one was suspended or
            cut off from the storage for long.
    """
    with nullcontext() if is_remote(run_dir) else _locked_here(run_dir):
        lease = _Lease(run_dir)
        lease.take()
        with lease.stops_this_process():
            thread = threading.Thread(target=lease.renew, name="lease", daemon=True)
            thread.start()
            try:
                yield
            except KeyboardInterrupt:
                if lease.lost is None:
                    raise
            finally:
                lease.over.set()
                thread.join()
                lease.give_back()


def lease_holder(run_dir: Path) -> str | None:
    """Name the driver that holds, or held to its sudden end, a run directory.

    Raises:
        StorageError: The store of a URI does not tell.
    """
    found = _read(run_dir / LEASE_FILE)
    if not found:
        return None
    return f"{_name(found)}, which is gone" if _is_gone(found) else _name(found)


@contextmanager
def _locked_here(run_dir: Path) -> Iterator[None]:
    """Hold the lock, which ends with the process, against drivers on this machine."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise _refused(run_dir, f"process {file.read() or '(unknown)'}") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class _Lease:
    """This process's lease of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / LEASE_FILE
        self.over = threading.Event()
        self.lost: str | None = None
        """Who took it over."""
        self._id = secrets.token_hex(8)
        self._document = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "processes": _processes(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "id": self._id,
        }
        self._count = 0
        self._stops: int | None = None
        self._heard = False
        """Whether the main thread was stopped."""

    def take(self) -> None:
        """Write the lease where there is none, or a stale one.

        Raises:
            StorageError: It is another driver's.
        """
        if not is_remote(self.path):
            with contextlib.suppress(FileExistsError):  # of several drivers one makes the file
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                self._write()
                return
        found = _read(self.path)
        deadline = time.monotonic() + STALE_AFTER_S
        while found is not None and not _is_gone(found) and time.monotonic() < deadline:
            time.sleep(SETTLED_AFTER_S)
            if (now := _read(self.path)) != found:
                if now is None:  # it was given back
                    break
                raise _refused(self.run_dir, _name(now))
        self._write()
        if found is not None and _is_gone(found) and not is_remote(self.path):
            return  # the lock keeps others on this machine out
        time.sleep(SETTLED_AFTER_S)
        now = _read(self.path)
        if now is None or now.get("id") != self._id:
            raise _refused(self.run_dir, _name(now or {}))

    def renew(self) -> None:
        """Write it again and again; stop the process if it is another driver's by now."""
        failing = False
        while not self.over.wait(RENEWED_EVERY_S):
            try:
                found = _read(self.path)
                if found is not None and found.get("id", self._id) != self._id:
                    self.lost = _name(found)
                    logger.error("%s", self._lost_error())
                    self._stop_main_thread()
                    return
                self._write()
                failing = False
            except (StorageError, OSError) as error:  # it may come back before the lease is stale
                if not failing:
                    logger.warning("the lease of %s: %s", display_path(self.run_dir), error)
                failing = True

    def give_back(self) -> None:
        """End it.

        Raises:
            StorageError: It is another driver's by now.
        """
        if self.lost is not None:
            raise self._lost_error()
        with contextlib.suppress(StorageError, OSError):  # it will be stale soon
            if (_read(self.path) or {}).get("id") == self._id:
                remove(self.path)

    def stops_this_process(self) -> AbstractContextManager[None]:
        """Let the loss of the lease interrupt the main thread, as Ctrl-C does."""
        if threading.current_thread() is not threading.main_thread():
            return nullcontext()  # only the main thread can be: its block goes on to its end
        self._stops = threading.get_ident()
        return self._interrupted_by_stop()

    def _stop_main_thread(self) -> None:
        """Signal until it is heard: a signal just before a call that blocks does not end that."""
        while self._stops is not None and not self._heard and not self.over.is_set():
            signal.pthread_kill(self._stops, _STOP)
            self.over.wait(RESENT_EVERY_S)

    @contextmanager
    def _interrupted_by_stop(self) -> Iterator[None]:
        def interrupt(*_: object) -> None:
            if not self._heard:  # once: a second one would cut short what the first one ends
                self._heard = True
                raise KeyboardInterrupt  # what Ray heeds while it waits

        before = signal.signal(_STOP, interrupt)
        try:
            yield
        finally:
            signal.signal(_STOP, before)

    def _write(self) -> None:
        self._count += 1
        content = json.dumps(self._document | {"count": self._count}).encode().ljust(_SIZE)
        if is_remote(self.path):
            object_store.write(self.path, content)
            return
        # In place: what NFS's clients know of a name may be older than what they know of a file.
        file = os.open(self.path, os.O_CREAT | os.O_WRONLY)
        try:
            os.pwrite(file, content, 0)
        finally:
            os.close(file)

    def _lost_error(self) -> StorageError:
        return StorageError(
            f"run directory {display_path(self.run_dir)} was taken over by {self.lost}: this "
            "process was suspended, or cut off from the storage, for too long. It stops here and "
            "the other one goes on."
        )


def _read(path: Path) -> dict[str, Any] | None:
    """Read a lease; None: there is none; empty: it is just being written."""
    try:
        document = json.loads(object_store.read(path) if is_remote(path) else path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _name(lease: dict[str, Any]) -> str:
    told = {name: lease.get(name, "(unknown)") for name in ("pid", "host", "started")}
    return "process {pid} on host {host} (started {started})".format(**told)


def _refused(run_dir: Path, holder: str) -> StorageError:
    return StorageError(
        f"run directory {display_path(run_dir)} is in use by {holder}: wait for it, stop it, or "
        "choose another --run-dir."
    )


def _is_gone(lease: dict[str, Any]) -> bool:
    """Whether the holder is a process that would be seen here, and is not."""
    if not lease or lease.get("processes") != _processes():
        return False
    try:
        os.kill(int(lease["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _processes() -> str:
    """Name what numbers processes: a machine since its start, or a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)  # unknown: like nobody else's

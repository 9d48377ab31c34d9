"""One driver per run directory: a lock on this machine, and a lease for drivers elsewhere.

A lease is a numbered file, which of several drivers one alone can create, and which its holder
writes again every few seconds. One that no longer changes was left by a driver that was killed:
it is taken over by creating the next number. So its number is a fencing token: whoever finds the
next one stops (see ``storage.fence``). Lease files stay, so that no number is given twice.

No two drivers hold a lease at once if the store shows what was written, clocks agree in their
rates to within ``MARGIN_S`` of ``STALE_AFTER_S``, and nothing takes longer than ``MARGIN_S``
between a check and the appearance of the file it was for. What the clocks show does not matter.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from tdc_ray.errors import StorageError
from tdc_ray.storage import object_store
from tdc_ray.storage.fence import fenced
from tdc_ray.storage.files import NOT_JSON, listing, read_bytes
from tdc_ray.storage.object_store import display_path, is_remote

LOCK_FILE = ".lock"
LEASE_DIR = ".lease"

OLD_LEASE_FILE = ".lease.json"
"""The lease of 0.1.0, which counts as number 0."""

RENEWED_EVERY_S = 2.0
STALE_AFTER_S = 8.0
"""A lease that did not change for so long is taken over."""

MARGIN_S = 1.0
"""How much earlier its holder believes that it ran out."""

POLLED_EVERY_S = 1.0
"""Time between two looks at another driver's lease."""

SETTLED_AFTER_S = 1.0
"""Time after which the last of several drivers that create a lease at once holds it, where the
store lets them all."""

PATIENCE_S = 90.0
"""Longest time for a driver whose lease was taken over to notice: NFS clients show the new file
of another client after up to a minute."""

WRITTEN_WITHIN_S = 0.5
"""Time in which the content of a file that was created is there."""

RESENT_EVERY_S = 0.5
"""Time between two signals to the main thread, until it is interrupted."""

_STOP = signal.SIGRTMIN + 11 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2  # on macOS
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
        lease = Lease(run_dir.resolve(), LeaseFiles(run_dir))
        lease.acquire()
        keeper = _Keeper(lease)
        with keeper.interrupts_main_thread(), fenced(lease):
            thread = threading.Thread(target=keeper.renew, name="lease", daemon=True)
            thread.start()
            try:
                yield
            except KeyboardInterrupt:
                if lease.lost_to is None:
                    raise
            finally:
                keeper.over.set()
                thread.join()
                lease.release()


def lease_holder(run_dir: Path) -> str | None:
    """Return the name of the driver that holds a run directory, or held it until it was killed.

    Raises:
        StorageError: The store of a URI fails.
    """
    files = LeaseFiles(run_dir)
    document = files.read(files.last())
    if not document or document.get("released"):
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


class Files(Protocol):
    """The lease files of a run directory, by their numbers."""

    is_exclusive: bool
    """Whether of several drivers that create a file at once one alone can."""

    def last(self) -> int:
        """Return the highest number, 0 if there is none."""

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return whether this call did, and not another driver."""

    def read(self, number: int) -> Document | None:
        """Read a file; None means that there is none, empty that it is just being written."""

    def write(self, number: int, content: bytes) -> None:
        """Replace the content of a file."""


class LeaseFiles:
    """Lease files on a disk, on NFS or in an object store."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.is_exclusive = not is_remote(run_dir) or object_store.creates_exclusively(run_dir)

    def last(self) -> int:
        """Return the highest number, 0 if there is none."""
        paths = listing(self._run_dir / LEASE_DIR, "*.json")
        return max((int(path.stem) for path in paths if path.stem.isdecimal()), default=0)

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return whether this call did, and not another driver."""
        path = self._path(number)
        if is_remote(path):
            return object_store.create(path, content)
        path.parent.mkdir(exist_ok=True)
        try:
            file = path.open("xb")  # O_EXCL: NFS, too, lets one client alone create it
        except FileExistsError:
            return False
        with file:
            file.write(content)
        return True

    def read(self, number: int) -> Document | None:
        """Read a file; None means that there is none, empty that it is just being written."""
        try:
            document = json.loads(read_bytes(self._path(number)))
        except FileNotFoundError:
            return None
        except NOT_JSON:
            return {}
        return document if isinstance(document, dict) else {}

    def write(self, number: int, content: bytes) -> None:
        """Replace the content of a file."""
        path = self._path(number)
        if is_remote(path):
            object_store.write(path, content)
            return
        # In place: NFS clients may cache a name's file for longer than a file's content.
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY), "wb") as file:
            file.write(content)

    def _path(self, number: int) -> Path:
        if number == 0:
            return self._run_dir / OLD_LEASE_FILE
        return self._run_dir / LEASE_DIR / f"{number:06d}.json"


def _read_begun(
    files: Files, number: int, sleep: Callable[[float], None] = time.sleep
) -> Document | None:
    """Read a lease that may be in the making, perhaps by this driver itself, which has it then."""
    document = files.read(number)
    if document == {}:
        sleep(WRITTEN_WITHIN_S)
        document = files.read(number)
    return document


def _boot_time() -> float:
    """Return seconds of a clock that is never set, and goes on while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """This process's lease of a run directory, and its fence."""

    def __init__(
        self,
        run_dir: Path,
        files: Files,
        now: Callable[[], float] = _boot_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.run_dir, self._files, self._now, self._sleep = run_dir, files, now, sleep
        self.number = 0
        self.lost_to: str | None = None
        self._valid_until = 0.0
        self._lock = threading.Lock()
        self._document: Document = {
            "id": secrets.token_hex(8),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "processes": _pid_namespace(),
            "started": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            "count": 0,
        }

    def acquire(self) -> None:
        """Create the lease after the last one, once that is released or stale.

        Raises:
            StorageError: It is another driver's.
        """
        last = self._files.last()
        before = self._wait_until_quiet(last, self._files.read(last), patience_s=0.0)
        if not self._begin(last + 1):
            raise _in_use(self.run_dir, _name(self._files.read(last + 1) or {}))
        # The holder before may have renewed its own just before: it still believes in it.
        self._wait_until_quiet(last, before, patience_s=PATIENCE_S, quiet_s=STALE_AFTER_S)
        self.renew()

    def _wait_until_quiet(
        self, number: int, seen: Document | None, *, patience_s: float, quiet_s: float = 0.0
    ) -> Document | None:
        """Wait until a lease is over, or did not change for long enough; return it.

        Args:
            number: Its number.
            seen: Its content some time ago.
            patience_s: How long it may change; then it is in use.
            quiet_s: For how long it did not change before.
        """
        began = self._now()
        quiet_since = began - quiet_s
        while not _is_over(seen):
            if self._now() - quiet_since < STALE_AFTER_S:
                self._sleep(POLLED_EVERY_S)
            if (found := self._files.read(number)) != seen:
                seen, quiet_since = found, self._now()
                if not _is_over(seen) and quiet_since - began >= patience_s:
                    raise _in_use(self.run_dir, _name(seen or {}))
            elif self._now() - quiet_since >= STALE_AFTER_S:
                break
        return seen

    def _begin(self, number: int) -> bool:
        """Create a lease; return whether it is this driver's."""
        began = self._now()
        if not self._files.create(number, self._content()):
            if not self._owns(self._files.read(number) or {}):
                return False
            self.number = number  # of an earlier call whose reply was lost: it may have run out
            return True
        if not self._files.is_exclusive or self._files.create(number, self._content()):
            logger.warning(
                "the storage of %s lets several drivers create the same file: two that start at "
                "the same moment may both go on. Start one only.",
                display_path(self.run_dir),
            )
            self._sleep(SETTLED_AFTER_S)
            if not self._owns(self._files.read(number) or {}):
                return False
        self.number, self._valid_until = number, began + STALE_AFTER_S - MARGIN_S
        return True

    def renew(self) -> None:
        """Renew it; one that ran out, as while this process was suspended, is begun anew.

        Raises:
            StorageError: Another driver took it over, or the store fails.
        """
        with self._lock:
            self._check_next()
            if (began := self._now()) < self._valid_until:
                self._files.write(self.number, self._content())
                self._check_next()
                self._valid_until = began + STALE_AFTER_S - MARGIN_S
            elif not self._begin(self.number + 1):
                self._check_next()

    def check(self) -> None:
        """Check that it is held at this moment.

        Raises:
            StorageError: Another driver took it over, or the store fails.
        """
        self._check_next()
        while self._now() >= self._valid_until:
            self.renew()

    def _check_next(self) -> None:
        """Raise an error if another driver has the next number."""
        if self.lost_to is None:
            document = _read_begun(self._files, self.number + 1, self._sleep)
            if document is not None and not self._owns(document):
                self.lost_to = _name(document)
        if self.lost_to is not None:
            raise _lost_error(self.run_dir, self.lost_to)

    def release(self) -> None:
        """Let the next driver have it at once.

        Raises:
            StorageError: Another driver took it over.
        """
        with self._lock, contextlib.suppress(StorageError, OSError):  # it will be stale soon
            self._check_next()
            self._files.write(self.number, self._content(released=True))
        if self.lost_to is not None:
            raise _lost_error(self.run_dir, self.lost_to)

    def _owns(self, document: Document) -> bool:
        return bool(document.get("id") == self._document["id"])

    def _content(self, *, released: bool = False) -> bytes:
        self._document["count"] += 1
        document = {**self._document, "released": True} if released else self._document
        return json.dumps(document).encode().ljust(_SIZE)

    def __reduce__(self) -> tuple[Any, ...]:
        return _WorkersFence, (self.run_dir, self.number, self._document["id"])


class _WorkersFence:
    """A driver's lease, as its workers see it."""

    def __init__(self, run_dir: Path, number: int, holder: str) -> None:
        self.run_dir, self._number, self._holder = run_dir, number, holder

    def check(self) -> None:
        """Check that no other driver has a later one.

        Raises:
            StorageError: One has.
        """
        files = LeaseFiles(self.run_dir)
        while (document := _read_begun(files, self._number + 1)) is not None:
            if document.get("id") != self._holder:
                raise _lost_error(self.run_dir, _name(document))
            self._number += 1  # the driver began it anew


class _Keeper:
    """Renews a lease in a thread, and interrupts the main one if it is lost."""

    def __init__(self, lease: Lease) -> None:
        self.over = threading.Event()
        self._lease = lease
        self._main_thread: int | None = None
        self._interrupted = False

    def renew(self) -> None:
        """Renew it periodically; stop the process if another driver took it over."""
        failing = False
        while not self.over.wait(RENEWED_EVERY_S):
            try:
                self._lease.renew()
                failing = False
            except (StorageError, OSError) as error:  # it may come back before the lease is stale
                if self._lease.lost_to is not None:
                    logger.error("%s", error)  # noqa: TRY400  the text says it all
                    self._interrupt_main_thread()
                    return
                if not failing:
                    logger.warning("the lease of %s: %s", display_path(self._lease.run_dir), error)
                failing = True

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


def _lost_error(run_dir: Path, other: str) -> StorageError:
    """Return the error of a driver whose lease another one took over."""
    return StorageError(
        f"run directory {display_path(run_dir)} was taken over by {other}: this process was "
        "suspended, or cut off from the storage, for too long. It stops here and the other one "
        "continues."
    )


def _name(document: Document) -> str:
    pid, host, started = (document.get(key, "(unknown)") for key in ("pid", "host", "started"))
    return f"process {pid} on host {host} (started {started})"


def _in_use(run_dir: Path, holder: str) -> StorageError:
    return StorageError(
        f"run directory {display_path(run_dir)} is in use by {holder}: wait for it, stop it, or "
        "choose another --run-dir."
    )


def _is_over(document: Document | None) -> bool:
    """Whether a lease is released, or its holder is gone."""
    return document is None or bool(document.get("released")) or _is_gone(document)


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

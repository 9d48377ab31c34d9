"""Ctrl-C and SIGTERM: the first one unwinds the work, wherever that is; a second ends it at once.

Python raises an exception where a signal meets it, which is lost where a library catches all, or
calls back into Python from C. So it is raised again each second until it is on its way up.
"""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

RAISED_AGAIN_EVERY_S = 1.0

SAME_WITHIN_S = 0.2
"""A second signal as soon after the first is the same interrupt."""

RESTORED_EVERY_S = 0.01
"""How often C code's handlers are replaced by ours while interrupts are deferred."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _State:
    """Of this process."""

    say: Callable[[int], None] | None = None
    """What an interrupt leads to; None means that signals are not handled here."""

    received: int | None = None
    """The first signal."""

    received_at = 0.0
    """When it came, by ``time.monotonic``."""

    handled: tuple[signal.Signals, ...] = ()
    deferring = False


_state = _State()


def handle_interrupts(say: Callable[[int], None]) -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt in the main thread from now on.

    One that is ignored, as Ctrl-C is by background jobs of a shell's script, stays so.

    Args:
        say: Is called with the first signal's number, at once.
    """
    _state.say, _state.received = say, None
    _state.handled = tuple(n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _raise_unless_unwinding)
    # As it ends, Python gives SIGALRM its default back, by which the process would be killed.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0.0)
    for number in _state.handled:
        signal.signal(number, _receive)


def ignore_interrupts() -> None:
    """Ignore SIGINT and SIGTERM from now on: the work is done, and its exit code is known."""
    for number in _state.handled:
        signal.signal(number, signal.SIG_IGN)


def received_signal() -> int | None:
    """Return the number of the signal that interrupted this process, or None."""
    return _state.received


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let an interrupt wait for the end of the block, and nobody else handle it meanwhile.

    For Ray's start and end: cut in between, it leaves processes, or crashes.
    """
    if _state.say is None or _state.deferring:
        yield
        return
    original = signal.signal

    def signal_of_others(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else original(number, handler)

    _state.deferring = True
    signal.signal = signal_of_others  # type: ignore[assignment]
    try:
        with _handlers_kept():
            yield
    finally:
        signal.signal = original
        _state.deferring = False
    if _state.received is not None:
        _raise_unless_unwinding()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep Python's handlers in place of C code's.

    As it starts (ray#37288) and as it ends, Ray's C++ sets others of SIGTERM, which end all.
    """
    python, over = ctypes.pythonapi, threading.Event()
    python.PyOS_getsig.restype = ctypes.c_void_p
    handlers = {number: ctypes.c_void_p(python.PyOS_getsig(number)) for number in _state.handled}

    def restore() -> None:
        is_over = False
        while not is_over:
            is_over = over.wait(RESTORED_EVERY_S)
            for number, handler in handlers.items():
                python.PyOS_setsig(number, handler)

    thread = threading.Thread(target=restore, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _receive(number: int, _frame: object) -> None:
    if _state.received is not None:
        if time.monotonic() - _state.received_at < SAME_WITHIN_S:
            return  # GNU timeout, for one, signals its child and then its child's group
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        kill_trees(child_processes(os.getpid()))
        os._exit(128 + number)
    _state.received, _state.received_at = number, time.monotonic()
    if _state.say is not None:
        with suppress(OSError):  # nobody listens: | head has ended, too
            _state.say(number)
    signal.setitimer(signal.ITIMER_REAL, RAISED_AGAIN_EVERY_S, RAISED_AGAIN_EVERY_S)
    _raise_unless_unwinding()


def child_processes(parent: int) -> set[int]:
    """Return the ids of the processes that one has started and that still run; on Linux."""
    pids = set[int]()
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):  # the thread is gone
            pids.update(map(int, path.read_text().split()))
    return pids


def kill_trees(pids: Iterable[int]) -> None:
    """Kill processes and all below them, each stopped before so that it starts no more.

    Ray's workers would outlive their raylet while they start.
    """
    for pid in pids:
        with suppress(OSError):  # it is gone, or another user's
            os.kill(pid, signal.SIGSTOP)
            kill_trees(child_processes(pid))
            os.kill(pid, signal.SIGKILL)


def _raise_unless_unwinding(*_: object) -> None:
    if _state.deferring:
        return
    error = sys.exc_info()[1]  # what is handled in the frames that the signal interrupted
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    if error is None:
        raise KeyboardInterrupt

"""A second host on this machine: a network namespace behind a bridge. Needs root."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

HERE, THERE = "10.77.0.1", "10.77.0.2"
NAMESPACE, BRIDGE, OUTER, INNER = "tdc-host", "tdc-br", "tdc-out", "tdc-in"


def ip(*arguments: str) -> str:
    """Run ``ip`` and give what it prints."""
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


class Host:
    """The other host, with one Ray node of one CPU at a time."""

    def __init__(self, head: str) -> None:
        self._head = head
        self.start_node()

    def start_node(self) -> None:
        """Start a node that joins the head."""
        flags = ["--address", self._head, "--node-ip-address", THERE, "--num-cpus=1", "--block"]
        inside = ["ip", "netns", "exec", NAMESPACE, sys.executable, "-m", "ray.scripts.scripts"]
        subprocess.Popen(
            [*inside, "start", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """End everything on it at once."""
        for pid in ip("netns", "pids", NAMESPACE).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut_off(self, seconds: float) -> None:
        """Interrupt its link for a while: both sides keep running, without contact."""
        ip("link", "set", OUTER, "down")
        time.sleep(seconds)
        ip("link", "set", OUTER, "up")


@contextmanager
def network() -> Iterator[None]:
    """Create the bridge and the namespace, and remove them."""
    _remove()
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("addr", "add", f"{HERE}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    ip("netns", "add", NAMESPACE)
    ip("link", "add", OUTER, "type", "veth", "peer", "name", INNER, "netns", NAMESPACE)
    ip("link", "set", OUTER, "master", BRIDGE, "up")
    ip("-n", NAMESPACE, "addr", "add", f"{THERE}/24", "dev", INNER)
    ip("-n", NAMESPACE, "link", "set", INNER, "up")
    ip("-n", NAMESPACE, "link", "set", "lo", "up")
    ip("-n", NAMESPACE, "route", "add", "default", "via", HERE)
    try:
        yield
    finally:
        _remove()


def _remove() -> None:
    for arguments in (
        ("netns", "del", NAMESPACE),
        ("link", "del", OUTER),
        ("link", "del", BRIDGE),
    ):
        with contextlib.suppress(subprocess.CalledProcessError):
            ip(*arguments)

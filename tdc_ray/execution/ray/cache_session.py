"""Runs that share a store and work side by side: each result is computed by one of them.

A run claims a key when a worker is about to start on it, never before, and others put that item
off meanwhile and do something else. So a claim is always of work that goes on, and nobody waits in
a circle. Claims hold among the runs of one Ray job, such as the trials of a sweep.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tdc_ray.execution.cache import ResultCache, key_of
from tdc_ray.execution.item import (
    AnyItem,
    Report,
    Runner,
    StepMetrics,
    finished,
    run_item,
)
from tdc_ray.storage.object_store import display_path, writer_id

RENEWED_EVERY_S = 2.0
STALE_AFTER_S = 10.0
"""A claim that was not renewed for so long is of a run that was killed."""

SECONDS_BETWEEN_LOOKS = 0.5

logger = logging.getLogger(__name__)


class ClaimRegistry:
    """Which run is computing which key; an actor that all runs of a Ray job share."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[str, float]] = {}

    def claim(self, key: str, owner: str) -> bool:
        """Whether the key is now the owner's: it was free, stale, or the owner's already."""
        holder, since = self.held.get(key, (owner, 0.0))
        if holder != owner and time.monotonic() - since < STALE_AFTER_S:
            return False
        self.renew([key], owner)
        return True

    def renew(self, keys: Sequence[str], owner: str) -> None:
        """Keep the owner's claims from going stale."""
        for key in keys:
            self.held[key] = (owner, time.monotonic())

    def release(self, key: str, owner: str) -> None:
        """Free a key, if it is the owner's."""
        if self.held.get(key, ("", 0.0))[0] == owner:
            del self.held[key]


def start_claim_registry(root: Path) -> Any:
    """Give the actor that keeps the claims on a store, starting it if there is none.

    It lives as long as what this first call in the Ray job returned.
    """
    name = hashlib.sha256(display_path(root).encode()).hexdigest()[:16]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote: Any = ray.remote(num_cpus=0, max_restarts=-1)(ClaimRegistry)
    return remote.options(
        name=f"tdc-ray-claims-{name}", get_if_exists=True, scheduling_strategy=here
    ).remote()


class CacheSession:
    """One run's dealings with a store; a context manager that keeps its claims alive.

    Without a store every item is run, and nothing is shared.
    """

    def __init__(self, store: ResultCache | None) -> None:
        self._store = store
        self._claims: Any = None
        self._owner = "" if store is None else f"{store.run} {writer_id()}"
        self._held: dict[str, str] = {}
        """Keys, by those of their items within the run."""

        self._keys: dict[str, tuple[AnyItem, str | None]] = {}
        """Keys of items that were to be started."""

        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)

    def __enter__(self) -> "CacheSession":
        if self._store is not None:
            self._claims = start_claim_registry(self._store.root)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self, item: AnyItem) -> Runner | None:
        """Return what runs an item; None means that another run is at it, ask again.

        It takes the result from the store where it is there, else leaves it there.
        """
        store = self._store
        key = None if store is None else self._key(item)
        if store is None or key is None:
            return run_item
        if not store.contains(key) and not self._claim(item.key, key):
            return None
        # The result may have come with the claim.
        return partial(store.load_item if store.contains(key) else store.run_item, key=key)

    def end(self, item: AnyItem) -> None:
        """Note that an item is no longer under way."""
        self._keys.pop(item.key, None)
        self._release(item.key)

    @contextmanager
    def alone(
        self, item: AnyItem, reported: Sequence[StepMetrics], report: Report
    ) -> Iterator[bool]:
        """Keep an item, which the block runs by other means than a pool, from other runs.

        Waits while another run is at it. Gives whether nothing is left to do: the store had it.
        Otherwise the block leaves result and files as the item says, and they are published.

        Args:
            item: The item.
            reported: What it has reported when the block ends.
            report: Takes what it reported to the run that computed it.
        """
        store, done = self._store, finished(item)
        key = None if store is None or (done and done.cached) else key_of(item)
        if store is None or key is None:
            yield done is not None
            return
        said = False
        while not store.contains(key) and not self._claim(item.key, key):
            if not said:
                logger.info("%s: another run computes the same; waiting for it", item.key)
            said = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        try:
            if done is None and store.contains(key):
                store.load(item, key, report)
                yield True
                return
            yield False
            done = finished(item)
            assert done is not None
            store.save(item, key, done.value, reported)
        finally:
            self.end(item)

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Hold a name that one run at a time may have; waits for it."""
        while not self._claim(name, name):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        try:
            yield
        finally:
            self._release(name)

    def _key(self, item: AnyItem) -> str | None:
        """Give an item's key; of one that is put off it is found once."""
        known = self._keys.get(item.key)
        if known is None or known[0] is not item:
            known = self._keys[item.key] = (item, key_of(item))
        return known[1]

    def _claim(self, name: str, key: str) -> bool:
        """Claim a key under a name of this run's own."""
        try:
            claimed = bool(ray.get(self._claims.claim.remote(key, self._owner)))
        except RayError as error:  # at worst something is computed twice
            logger.warning("claims on %s are not to be had: %s", name, error)
            return True
        if claimed:
            self._held[name] = key
        return claimed

    def _release(self, name: str) -> None:
        key = self._held.pop(name, None)
        if key is not None:
            self._claims.release.remote(key, self._owner)

    def _renew(self) -> None:
        while not self._over.wait(RENEWED_EVERY_S):
            if keys := list(self._held.values()):
                self._claims.renew.remote(keys, self._owner)

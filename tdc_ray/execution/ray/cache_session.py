"""Runs that share a cache and work side by side: each result is computed by one of them.

A run claims a key when a worker is about to start on it, never before, and others postpone that
item meanwhile and run something else. So a claim is always of work in progress, and there is no
deadlock. Claims hold among the runs of one Ray job, such as the trials of a sweep.
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
from ray.exceptions import ActorDiedError, RayError

from tdc_ray.execution.cache import ResultCache, key_of
from tdc_ray.execution.item import AnyItem, Report, Runner, StepMetrics, finished, run_item
from tdc_ray.execution.ray.cluster import actor_here
from tdc_ray.storage.object_store import display_path, writer_id

RENEWED_EVERY_S = 2.0
STALE_AFTER_S = 10.0
"""A claim that was not renewed for this time is of a run that was killed."""

SECONDS_BETWEEN_TRIES = 0.5
NUM_TRIES = 10
"""New registries in place of one that died, before an item runs without a claim."""

logger = logging.getLogger(__name__)


class ClaimRegistry:
    """Which run computes which key; an actor that all runs of a Ray job share."""

    def __init__(self) -> None:
        self.claims: dict[str, tuple[str, float]] = {}

    def claim(self, key: str, owner: str) -> bool:
        """Whether the key is now the owner's: it was free, stale, or the owner's already."""
        holder, since = self.claims.get(key, (owner, 0.0))
        if holder != owner and time.monotonic() - since < STALE_AFTER_S:
            return False
        self.renew([key], owner)
        return True

    def renew(self, keys: Sequence[str], owner: str) -> None:
        """Renew the owner's claims."""
        for key in keys:
            self.claims[key] = (owner, time.monotonic())

    def release(self, key: str, owner: str) -> None:
        """Free a key, if it is the owner's."""
        if self.claims.get(key, ("", 0.0))[0] == owner:
            del self.claims[key]


def start_claim_registry(root: Path) -> Any:
    """Return the actor that holds the claims on a cache, started if there is none.

    It lives as long as what this first call in the Ray job returned.
    """
    name = hashlib.sha256(display_path(root).encode()).hexdigest()[:16]
    options = actor_here(ClaimRegistry, name=f"tdc-ray-claims-{name}", get_if_exists=True)
    return options.remote()


class CacheSession:
    """One run's use of a cache; a context manager that keeps its claims alive.

    Without a cache every item is run, and nothing is shared.
    """

    def __init__(self, cache: ResultCache | None) -> None:
        self._cache = cache
        self._registry: Any = None
        self._owner = "" if cache is None else f"{cache.run} {writer_id()}"
        self._claimed: dict[str, str] = {}
        """Keys, by what they were claimed for."""

        self._keys: dict[str, tuple[AnyItem, str | None]] = {}
        """Keys of items that were postponed: computed once."""

        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claims", daemon=True)

    def __enter__(self) -> "CacheSession":
        if self._cache is not None:
            self._registry = start_claim_registry(self._cache.root)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def acquire(self, item: AnyItem) -> Runner | None:
        """Return what runs an item; None means that another run computes it: ask again.

        It loads the result from the cache if it is there, else saves it there.
        """
        cache = self._cache
        key = None if cache is None else self._key(item)
        if cache is None or key is None:
            return run_item
        if not cache.contains(key) and not self._claim(item.key, key):
            return None
        # The result may have come with the claim.
        return partial(cache.load if cache.contains(key) else cache.compute, key=key)

    def release(self, item: AnyItem) -> None:
        """Release the claim on an item that no longer runs."""
        self._keys.pop(item.key, None)
        self._release(item.key)

    @contextmanager
    def compute_once(
        self, item: AnyItem, reported: Sequence[StepMetrics], report: Report
    ) -> Iterator[bool]:
        """Keep other runs from an item that the block computes without a pool.

        Waits while another run computes it. Yields whether nothing is left to do: it is finished,
        or the cache had it. Otherwise the block writes result and files as the item says, and they
        are saved in the cache.

        Args:
            item: The item.
            reported: Everything that it reported by the end of the block.
            report: Is called with what it reported to the run that computed it.
        """
        cache, done = self._cache, finished(item)
        key = None if cache is None or (done and done.cached) else key_of(item)
        if cache is None or key is None:
            yield done is not None
            return
        if not cache.contains(key) and not self._claim(item.key, key):
            logger.info("%s: another run computes the same; waiting for it", item.key)
            while not cache.contains(key) and not self._claim(item.key, key):
                time.sleep(SECONDS_BETWEEN_TRIES)
        try:
            if done is None and cache.contains(key):
                cache.load(item, report, key=key)
                yield True
                return
            yield False
            done = finished(item)
            assert done is not None
            cache.save(item, key, done.value, reported)
        finally:
            self.release(item)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a name that one run at a time may hold; waits for it."""
        while not self._claim(name, name):
            time.sleep(SECONDS_BETWEEN_TRIES)
        try:
            yield
        finally:
            self._release(name)

    def _key(self, item: AnyItem) -> str | None:
        known = self._keys.get(item.key)
        if known is None or known[0] is not item:
            known = self._keys[item.key] = (item, key_of(item))
        return known[1]

    def _claim(self, name: str, key: str) -> bool:
        """Claim a key in this run's name."""
        try:
            claimed = self._try_to_claim(key)
        except RayError as error:  # at worst something is computed twice
            logger.warning("claims on %s are not available: %s", name, error)
            return True
        if claimed:
            self._claimed[name] = key
        return claimed

    def _try_to_claim(self, key: str) -> bool:
        assert self._cache is not None
        for _ in range(NUM_TRIES):
            try:
                return bool(ray.get(self._registry.claim.remote(key, self._owner)))
            except ActorDiedError:  # it went with the session that had started it
                time.sleep(SECONDS_BETWEEN_TRIES)  # for a while its name leads to the dead one
                self._registry = start_claim_registry(self._cache.root)
        return bool(ray.get(self._registry.claim.remote(key, self._owner)))

    def _release(self, name: str) -> None:
        key = self._claimed.pop(name, None)
        if key is not None:
            self._registry.release.remote(key, self._owner)

    def _renew(self) -> None:
        while not self._over.wait(RENEWED_EVERY_S):
            if keys := list(self._claimed.values()):
                self._registry.renew.remote(keys, self._owner)

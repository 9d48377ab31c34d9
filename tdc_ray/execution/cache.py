"""A store of results that several runs share, so that nothing is computed twice.

It is content-addressed: the key of a result is the SHA-256 of everything that it follows from
(``WorkItem.inputs``, see ``tdc_ray.data.fingerprint``), with the versions of what computes. A
store is a cache in a folder or at a URI; it may be deleted whenever no run uses it.

An entry is a folder named by its key. Every publisher writes files into a folder of its own in it,
and ``entry.json``, which names that, last: so an entry is whole when it is seen, whoever else
publishes the same, and one whose publisher was killed is none.
"""

import functools
import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tdc_ray.errors import StorageError, StorageFailedError
from tdc_ray.execution.item import Inputs, Report, Reported, Result, WorkItem
from tdc_ray.storage.digest import json_digest, tree_digest
from tdc_ray.storage.files import atomic_path, exists, fetch, read_json, remove, write_json
from tdc_ray.storage.object_store import display_path, is_remote
from tdc_ray.storage.provenance import versions

FORMAT = 2
ENTRY_FILE = "entry.json"

SHARED = "shared"
"""In a result: its key, and whether it was taken from the store."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResultCache:
    """A store, as one run uses it."""

    root: Path
    run: str
    """Names the run: what it published itself before it was cut, it does not reuse."""

    def entry(self, key: str) -> Path:
        """Where an entry is."""
        return self.root / key[:2] / key

    def contains(self, key: str) -> bool:
        """Whether there is such a result."""
        return exists(self.entry(key) / ENTRY_FILE)

    def save(
        self, item: WorkItem, key: str, result: Result, reported: Sequence[Reported] = ()
    ) -> Result:
        """Keep an item's result and files; give the result as the run keeps it.

        Args:
            item: The item, which was run.
            key: Its key.
            result: What came out.
            reported: What it reported, for the curves of those that take it.

        Raises:
            StorageFailedError: The disk or the object store does not take it.
        """
        entry = self.entry(key)
        if self.contains(key):  # another run was as quick
            return _marked(result, key, reused=False)
        own = entry / secrets.token_hex(8)
        digests = [_copy(path, own / str(number)) for number, path in enumerate(item.files)]
        document = {
            "format": FORMAT,
            "item": item.key,
            "run": self.run,
            "inputs": _inputs(item),
            "files": {"folder": own.name, "digests": digests},
            "result": result,
            "reported": reported,
        }
        write_json(entry / ENTRY_FILE, document)
        return _marked(result, key, reused=False)

    def load(
        self, item: WorkItem, key: str, report: Report = lambda _metrics, _step: None
    ) -> Result:
        """Bring an item's files into the run, report what it did, and give its result.

        On one local file system files are linked, else copied.

        Raises:
            StorageFailedError: The entry is damaged and was removed, or cannot be read.
        """
        entry = self.entry(key)
        try:
            document = read_json(entry / ENTRY_FILE)
            own = entry / Path(document["files"]["folder"]).name
            digests = [_copy(own / str(number), path) for number, path in enumerate(item.files)]
            _require_same(digests, document["files"]["digests"], own)
            result: Result = document["result"]
            reused = document["run"] != self.run
            reported: list[Reported] = document["reported"] if reused else []
        except StorageFailedError:
            raise
        except (StorageError, OSError, KeyError, TypeError, ValueError) as error:
            remove(entry / ENTRY_FILE)
            raise StorageFailedError(
                f"{display_path(entry)} is no whole entry of a store, and was removed: {error}"
            ) from error
        for step, metrics in reported:
            report(metrics, step)
        return _marked(result, key, reused=reused)

    def loading(self, item: WorkItem, key: str) -> WorkItem:
        """Give what takes an item's result in place of running it."""
        return replace(item, function=partial(_take, store=self, item=item, key=key))

    def saving(self, item: WorkItem, key: str) -> WorkItem:
        """Give what runs an item and publishes its result."""
        return replace(item, function=partial(_run, store=self, item=item, key=key))


def key_of(item: WorkItem) -> str | None:
    """Give the key of an item's result; None: it cannot be shared."""
    inputs = _inputs(item)
    if inputs is None:
        return None
    document = {"format": FORMAT, "packages": _packages(), **inputs}
    return json_digest(document)


def shared(result: Result) -> tuple[str, bool] | None:
    """Tell a result's key and whether it was taken from a store; None: it is of no store."""
    mark = result.get(SHARED)
    return None if mark is None else (mark["key"], mark["reused"])


def _inputs(item: WorkItem) -> Inputs | None:
    return None if item.inputs is None else item.inputs(item.job)


def _marked(result: Result, key: str, *, reused: bool) -> Result:
    return {**result, SHARED: {"key": key, "reused": reused}}


def _require_same(found: list[str], expected: list[str], folder: Path) -> None:
    if found != expected:
        raise StorageError(f"files in {display_path(folder)} were changed.")


def _is_first() -> bool:
    """Whether this process is the first, or only, worker of its item."""
    from tdc_ray.execution.device import (
        worker_rank,
    )  # imports torch, without which a driver may do

    return worker_rank().rank == 0


def _take(_job: Any, report: Report, *, store: ResultCache, item: WorkItem, key: str) -> Result:
    if not _is_first():
        return {}
    result = store.load(item, key, report)
    report({}, item.num_steps)
    return result


def _run(job: Any, report: Report, *, store: ResultCache, item: WorkItem, key: str) -> Result:
    reported: list[Reported] = []

    def told(metrics: Mapping[str, float], step: int) -> None:
        reported.append((step, dict(metrics)))
        report(metrics, step)

    result = item.function(job, told)
    return store.save(item, key, result, reported) if _is_first() else result


@functools.cache
def _packages() -> Mapping[str, str]:
    """Versions of what computes."""
    found = versions()
    return {name: found[name] for name in ("torch", "diffusers")}


def _copy(source: Path, target: Path) -> str:
    """Copy a file or folder, by links where that goes, and name its content.

    Nothing in a run or a store is ever changed in place, so a link is as good as a copy.
    """
    source = fetch(source)
    link = not is_remote(source) and not is_remote(target)
    with atomic_path(target) as temporary:
        files = [source] if source.is_file() else sorted(source.rglob("*"))
        for file in files:
            name = file.relative_to(source)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                _link(file, temporary / name, link=link)
        return tree_digest(temporary)


def _link(source: Path, target: Path, *, link: bool) -> None:
    if link:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copyfile(source, target)

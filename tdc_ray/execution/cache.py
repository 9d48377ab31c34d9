"""A cache of results that several runs share, so that nothing is computed twice.

It is content-addressed: the key of a result is the SHA-256 of everything that it follows from
(``WorkItem.inputs``, see ``tdc_ray.data.fingerprint``), versions of the libraries included. It is
in a folder or at a URI, and may be deleted whenever no run uses it.

An entry is a folder named by its key. Every run that saves it writes files into a folder of its
own in it, and ``entry.json``, which names that, last: so an entry is whole when it is seen,
whoever else saves the same, and one whose writer was killed is none.
"""

import functools
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from tdc_ray.errors import StorageError, StorageFailedError
from tdc_ray.execution.item import (
    AnyItem,
    CacheMark,
    Inputs,
    ItemResult,
    R,
    Report,
    StepMetrics,
    WorkItem,
    checked_result,
)
from tdc_ray.storage.digest import json_digest, tree_digest
from tdc_ray.storage.files import atomic_path, exists, fetch, read_json, remove, write_json
from tdc_ray.storage.object_store import display_path, is_remote
from tdc_ray.storage.provenance import versions

FORMAT = 2
ENTRY_FILE = "entry.json"


@dataclass(frozen=True, slots=True)
class ResultCache:
    """A cache, as one run uses it."""

    root: Path
    run: str
    """Names the run: what it saved itself before it was interrupted, it does not reuse."""

    def entry(self, key: str) -> Path:
        """Return where an entry is."""
        return self.root / key[:2] / key

    def contains(self, key: str) -> bool:
        """Whether there is such a result."""
        return exists(self.entry(key) / ENTRY_FILE)

    def saved_by(self, key: str) -> str | None:
        """Name the run that saved an entry; None where there is none."""
        if not self.contains(key):
            return None
        return str(read_json(self.entry(key) / ENTRY_FILE)["run"])

    def save(
        self, item: WorkItem[Any, R], key: str, value: R, reported: Sequence[StepMetrics] = ()
    ) -> None:
        """Save an item's result and files here, and its result in the run.

        Args:
            item: The item, which was run.
            key: Its key.
            value: Its result.
            reported: What it reported, for the curves of the runs that reuse it.

        Raises:
            StorageFailedError: The disk or the object store does not take it.
        """
        entry = self.entry(key)
        if not self.contains(key):  # another run may have been as quick
            own = entry / secrets.token_hex(8)
            digests = [_copy(path, own / str(number)) for number, path in enumerate(item.files)]
            document = {
                "format": FORMAT,
                "item": item.key,
                "run": self.run,
                "inputs": _inputs(item),
                "files": {"folder": own.name, "digests": digests},
                "result": to_jsonable_python(value),
                "reported": reported,
            }
            write_json(entry / ENTRY_FILE, document)
        ItemResult(value, CacheMark(key, reused=False)).save(item.result_path)

    def load(
        self, item: WorkItem[Any, R], report: Report, *, is_first: bool = True, key: str
    ) -> R | None:
        """Bring an item's files and result into the run, and report what it reported: a `Runner`.

        On one local file system files are linked, else copied.

        Raises:
            StorageFailedError: The entry is damaged and was removed, or cannot be read.
        """
        if not is_first:
            return None
        entry = self.entry(key)
        try:
            document = read_json(entry / ENTRY_FILE)
            own = entry / Path(document["files"]["folder"]).name
            digests = [_copy(own / str(number), path) for number, path in enumerate(item.files)]
            _require_same(digests, document["files"]["digests"], own)
            value = checked_result(document["result"], item.result_type)
            reused = document["run"] != self.run
            reported: list[StepMetrics] = document["reported"] if reused else []
        except StorageFailedError:
            raise
        except (StorageError, OSError, KeyError, TypeError, ValueError) as error:
            remove(entry / ENTRY_FILE)
            raise StorageFailedError(
                f"{display_path(entry)} is no whole entry of a cache, and was removed: {error}"
            ) from error
        for step, metrics in reported:
            report(metrics, step)
        ItemResult(value, CacheMark(key, reused=reused)).save(item.result_path)
        report({}, item.num_steps)
        return value

    def compute(
        self, item: WorkItem[Any, R], report: Report, *, is_first: bool = True, key: str
    ) -> R | None:
        """Run an item, as ``run_item`` does, and save its result here too: a `Runner`."""
        reported: list[StepMetrics] = []

        def record(metrics: Mapping[str, float], step: int) -> None:
            reported.append((step, dict(metrics)))
            report(metrics, step)

        value = item.function(item.job, record)
        if not is_first:
            return None
        assert value is not None
        self.save(item, key, value, reported)
        return value


def key_of(item: AnyItem) -> str | None:
    """Return the key of an item's result; None means that it cannot be shared."""
    inputs = _inputs(item)
    if inputs is None:
        return None
    return json_digest({"format": FORMAT, "packages": _packages(), **inputs})


def _inputs(item: AnyItem) -> Inputs | None:
    return None if item.inputs is None else item.inputs(item.job)


def _require_same(digests: list[str], expected: list[str], folder: Path) -> None:
    if digests != expected:
        raise StorageError(f"files in {display_path(folder)} were changed.")


@functools.cache
def _packages() -> Mapping[str, str]:
    installed = versions()
    return {name: installed[name] for name in ("torch", "diffusers")}


def _copy(source: Path, target: Path) -> str:
    """Copy a file or folder, by links where that works, and return the digest of its content.

    Nothing in a run or a cache is ever changed in place, so a link is as good as a copy.
    """
    source = fetch(source)
    copy = shutil.copyfile if is_remote(source) or is_remote(target) else _link
    with atomic_path(target) as temporary:
        files = [source] if source.is_file() else sorted(source.rglob("*"))
        for file in files:
            name = file.relative_to(source)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                copy(file, temporary / name)
        return tree_digest(temporary)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)

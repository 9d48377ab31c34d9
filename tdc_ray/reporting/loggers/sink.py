"""A sink that writes to a tracker in a thread of its own.

A server that is slow or away delays nothing and ends nothing: once started, whatever a client
raises is a warning.
"""

import logging
import re
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdc_ray.errors import ConfigError
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.reporting.event_writer import EventWriter
from tdc_ray.reporting.loggers.clients import CLIENTS, Status
from tdc_ray.reporting.loggers.names import LoggerName
from tdc_ray.runs.events import RunFinished, SettingsSaved
from tdc_ray.storage.files import exists, read_json, write_json
from tdc_ray.storage.object_store import is_remote
from tdc_ray.storage.run_dir import RunDir

SECONDS_TO_END = 120.0
"""Longest wait at the end of a run for what a client has not sent."""

SUMMARY = ("preset", "seed", "dataset", "metric", "base", "tdc", "prune", "seconds", "comparison")
"""Parts of the results whose numbers and words are a run's summary."""

logger = logging.getLogger(__name__)


class LoggerSink(EventWriter):
    """A sink that writes to a tracker."""

    def __init__(self, run_dir: RunDir, name: LoggerName) -> None:
        super().__init__(run_dir)
        self._name, self._failed = name, False
        self._status: Status = "stopped"
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._end = ExitStack()

    def __enter__(self) -> "LoggerSink":
        """Start a run of the tracker, or continue that of an earlier call.

        Raises:
            ConfigError: The client cannot.
        """
        run_dir = self._run_dir
        ids = read_json(run_dir.loggers) if exists(run_dir.loggers) else {}
        folder = run_dir.root
        if is_remote(folder):
            folder = Path(self._end.enter_context(tempfile.TemporaryDirectory()))
        try:
            client = CLIENTS[self._name](run_dir.root.name, folder, ids.get(self._name))
        except Exception as error:  # noqa: BLE001  # whatever a client raises
            raise ConfigError(
                f"--log-to {self._name} cannot start: {without_passwords(error)} Log in by its "
                "own command or environment, let it work offline, or leave it out."
            ) from None
        if self._name in ids and exists(run_dir.memory):
            entries = MemoryBank(run_dir.memory).all()
            self._written = frozenset((entry.key, entry.loss) for entry in entries)
        write_json(run_dir.loggers, ids | {self._name: client.run_id})
        self._client = client
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._end:
            self._calls.put(partial(self._client.close, self._status))
            self._calls.put(None)
            self._thread.join(SECONDS_TO_END)
            if self._thread.is_alive():
                logger.warning("%s took too long to end; what it had not sent is lost", self._name)

    def __call__(self, event: object) -> None:
        """Write the settings, the parts of an event that are shown, and the final results."""
        super().__call__(event)
        match event:
            case SettingsSaved(document):
                self._calls.put(partial(self._client.settings, flat(document, ".")))
            case RunFinished(results):
                self._status = "finished"
                summary = {
                    name: value for name, value in asdict(results).items() if name in SUMMARY
                }
                values = flat(summary, "/", "results/")
                plain = {n: v for n, v in values.items() if isinstance(v, int | float | str)}
                self._calls.put(partial(self._client.summary, plain))

    def _add_scalars(self, series: str, values: Mapping[str, float], step: int) -> None:
        self._calls.put(partial(self._client.scalars, series, values, step))

    def _add_image(self, series: str, tag: str, image: NDArray[np.uint8], step: int = 0) -> None:
        self._calls.put(partial(self._client.image, series, tag, image, step))

    def _add_text(self, series: str, tag: str, text: str, step: int) -> None:
        self._calls.put(partial(self._client.text, series, tag, text, step))

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:  # noqa: BLE001  # whatever a client raises
                if not self._failed:
                    self._failed = True
                    logger.warning(
                        "%s failed, and the run goes on; later failures are not shown: %s",
                        self._name,
                        without_passwords(error),
                    )


def flat(document: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their joined names."""
    values: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping):
            values |= flat(value, separator, f"{prefix}{name}{separator}")
        else:
            values[prefix + name] = value
    return values


def without_passwords(error: Exception) -> str:
    """Return the first line of an error, without the user and password of an address."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"//[^/@\s]+@", "//", text.splitlines()[0])

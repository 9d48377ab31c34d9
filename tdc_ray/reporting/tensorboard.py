"""Writes the events of a run as TensorBoard's event files.

A series is a run of TensorBoard's, in the run directory's ``tensorboard``.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tdc_ray.reporting.event_writer import EventWriter
from tdc_ray.storage.mirror import synced_while_growing
from tdc_ray.storage.run_dir import RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SECONDS_BETWEEN_FLUSHES = 10
"""Greatest age of what TensorBoard shows."""


class TensorBoard(EventWriter):
    """A sink that writes event files."""

    def __init__(self, run_dir: RunDir) -> None:
        super().__init__(run_dir)
        self._end = ExitStack()
        self._writers: dict[str, SummaryWriter] = {}

    def __enter__(self) -> "TensorBoard":
        self._dir = self._end.enter_context(synced_while_growing(self._run_dir.tensorboard))
        return self

    def __exit__(self, *_: object) -> None:
        with self._end:
            for writer in self._writers.values():
                writer.close()

    def _add_scalars(self, series: str, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer(series, step).add_scalar(tag, value, step)

    def _add_image(self, series: str, tag: str, image: NDArray[np.uint8], step: int = 0) -> None:
        self._writer(series, step).add_image(tag, image, step, dataformats="HWC")

    def _add_text(self, series: str, tag: str, text: str, step: int) -> None:
        self._writer(series, step).add_text(tag, text, step)

    def _writer(self, series: str, step: int) -> "SummaryWriter":
        if series not in self._writers:
            from torch.utils.tensorboard import SummaryWriter  # imports torch

            self._writers[series] = SummaryWriter(
                str(self._dir / series), purge_step=step, flush_secs=SECONDS_BETWEEN_FLUSHES
            )
        return self._writers[series]

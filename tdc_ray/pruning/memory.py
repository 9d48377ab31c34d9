"""The memory bank (TDC Eq. 12): the schemes that were measured, and their losses."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tdc_ray.errors import StorageError
from tdc_ray.pruning.ranked import Ranked
from tdc_ray.storage.files import append_json_line, read_json_lines
from tdc_ray.storage.object_store import display_path


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalLosses(Ranked):
    """Losses of a finalist on images and noise that no earlier choice has seen."""

    loss_cut: float
    loss_refit: float | None
    num_images: int | None
    standard_error: float | None
    distance: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEntry(Ranked):
    """One scheme that was measured."""

    group: int
    round: int
    candidate: int

    source: str
    """Who proposed it: ``offline``, ``llm``, ``llm/repaired`` where some of the language model's
    changes did not count in full, or a score and its use, such as ``taylor/global``."""

    widths: Mapping[str, int]
    """The scheme."""

    macs: int
    num_params: int

    loss_cut: float
    """Loss on noise of the group's timesteps, straight after pruning."""

    loss_refit: float | None = None
    """Loss after the refit; None without one."""

    loss_tuned: float | None = None
    """Loss after a short fine-tune; None without one."""

    overshoot: int = 0
    """By how much the proposal was above the group's limit before it was fitted to it: in macs, or
    in nanoseconds where time is limited."""

    nanoseconds: int | None = None
    """Time of a forward pass by the table of measured times; None where macs are limited."""

    num_images: int | None = None
    """Images behind the losses; None in entries of 0.1.0."""

    noise: str | None = None
    """Which images and noise they are: ``choice`` or ``held-out`` (``pruning.noised``); None in
    entries of 0.1.0, which were held out."""

    standard_error: float | None = None
    """Standard error of the increase of the loss over the base's on the same images and noise."""

    loss_base: float | None = None
    """The base's loss on the same images and noise; None in entries of 0.1.0."""

    distance: float | None = None
    """Mean square of how far the prediction is from the base's."""

    distance_error: float | None = None
    """Standard error of the distance; None where it was not kept yet."""

    predicted: float | None = None
    """What `increase` was predicted to be before it was measured; None where nothing was, and in
    entries of 0.1.0."""

    hypothesis: str | None = None
    """What a language model meant to show by it."""

    final: FinalLosses | None = None
    """Its losses as a finalist; None where it was none."""

    def increase(self, loss_base: float) -> float:
        """Return the increase of the loss over the base's, after a refit to second order."""
        return self.rank - loss_base if self.ranks_by_loss else self.rank

    @property
    def increase_error(self) -> float | None:
        """Standard error of `increase`; None where it is not known."""
        return self.standard_error if self.ranks_by_loss else self.distance_error

    @property
    def is_by_llm(self) -> bool:
        """Whether a language model proposed it."""
        return self.source.startswith("llm")

    @property
    def key(self) -> tuple[int, int, int]:
        """Group, round and candidate, which no two entries share."""
        return (self.group, self.round, self.candidate)


_ADAPTER = TypeAdapter(MemoryEntry)


class MemoryBank:
    """An append-only file of entries with one writer; a line torn by a kill does not count."""

    def __init__(
        self, path: Path, listener: Callable[[MemoryEntry], None] = lambda _: None
    ) -> None:
        """Open the bank.

        Args:
            path: The file.
            listener: Called with every new entry.

        Raises:
            StorageError: The file holds a line that is no entry.
        """
        self.path, self._listener = path, listener
        try:
            entries = [_ADAPTER.validate_python(line) for line in read_json_lines(path)]
        except ValidationError as error:
            raise StorageError(
                f"{display_path(path)} holds a line that is no memory entry: {error}"
            ) from error
        self._entries = {entry.key: entry for entry in entries}

    def add(self, entry: MemoryEntry) -> None:
        """Add an entry; of the same scheme and source under the same key the first is kept.

        Another replaces it: with a shared bank a group that failed before may change the results
        of others, and in unfinished runs of older versions other proxies had the key.
        """
        before = self._entries.get(entry.key)
        is_new = before is None or before.widths != entry.widths or before.source != entry.source
        if is_new:
            self._write(entry)
            self._listener(entry)

    def set_final(self, key: tuple[int, int, int], final: FinalLosses) -> MemoryEntry:
        """Remember an entry's final losses, in a line that replaces it, and return it.

        No proxy sees them, so that a search that resumes finds the same schemes.
        """
        entry = dataclasses.replace(self._entries[key], final=final)
        if entry != self._entries[key]:
            self._write(entry)
        return entry

    def set_tuned_loss(self, key: tuple[int, int, int], loss: float) -> None:
        """Record the loss of an entry after a short fine-tune, in a line that replaces it."""
        tuned = dataclasses.replace(self._entries[key], loss_tuned=loss)
        if tuned != self._entries[key]:
            self._write(tuned)

    def _write(self, entry: MemoryEntry) -> None:
        append_json_line(self.path, dataclasses.asdict(entry))
        self._entries[entry.key] = entry

    def visible_to(self, group: int, *, before_round: int, shared: bool) -> list[MemoryEntry]:
        """Return the entries of earlier rounds, in the order of groups, rounds and candidates.

        Args:
            group: The group that reads them.
            before_round: The round that it is in.
            shared: Whether it sees the entries of other groups.
        """
        return sorted(
            (
                dataclasses.replace(entry, final=None)
                for entry in self._entries.values()
                if entry.round < before_round and (shared or entry.group == group)
            ),
            key=lambda entry: entry.key,
        )

    def all(self) -> list[MemoryEntry]:
        """Return all entries, in the order of groups, rounds and candidates."""
        return sorted(self._entries.values(), key=lambda entry: entry.key)


def best(entries: list[MemoryEntry]) -> MemoryEntry:
    """Return the entry of the lowest rank, the earliest of equals; NaN counts as the highest."""
    return min(entries, key=lambda entry: (math.isnan(entry.rank), entry.rank, entry.key))

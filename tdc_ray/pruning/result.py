"""What the search of a group results in, and what it took."""

from dataclasses import dataclass, field

from tdc_ray.models.units import KeptIndices, widths_of
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.space import Scheme


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sub-model that was measured."""

    entry: MemoryEntry
    kept: KeptIndices


@dataclass(slots=True)
class SearchCost:
    """What a search took."""

    macs: float = 0.0
    seconds: float = 0.0
    """Of computing, summed over workers."""

    proxy_seconds: float = 0.0
    """Of the proxy: of proposing, or of waiting for a language model."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    notes: list[str] = field(default_factory=list)
    """What went otherwise than asked for."""

    def add(self, macs: float, seconds: float) -> None:
        """Count an item that computed."""
        self.macs += macs
        self.seconds += seconds


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The sub-model that a group's expert starts from."""

    kept: KeptIndices
    entry: MemoryEntry | None
    """What is remembered of it; None means the base itself, of which nothing is cut."""

    loss_base: float
    """Loss of the uncut base on held-out images and noise of the group's timesteps."""

    candidates: tuple[Candidate, ...]
    """All that were measured, best first."""

    cost: SearchCost

    @property
    def widths(self) -> Scheme:
        """The scheme."""
        return widths_of(self.kept)

    @property
    def loss_cut(self) -> float:
        """The loss straight after the cut."""
        return self.loss_base if self.entry is None else self.entry.loss_cut

    @property
    def loss_refit(self) -> float | None:
        """The loss after the refit; None where there was none."""
        return None if self.entry is None else self.entry.loss_refit

"""The result of a group's search, and its cost."""

from collections import Counter
from collections.abc import Sequence
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
    """The cost of a search."""

    macs: float = 0.0
    seconds: float = 0.0
    """Time of computing, summed over workers."""

    proxy_seconds: float = 0.0
    """Time of the proxy: proposing, or waiting for a language model."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    proxy_cost: float = 0.0
    """Price of the language model's calls, in the currency of ``proxy``'s prices."""

    notes: list[str] = field(default_factory=list)
    """Deviations from the settings."""

    def add(self, macs: float, seconds: float) -> None:
        """Count an item that computed."""
        self.macs += macs
        self.seconds += seconds


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The sub-model that a group's expert starts from."""

    kept: KeptIndices
    entry: MemoryEntry | None
    """Its entry in the memory bank; None means the base itself, unpruned."""

    loss_base: float
    """Loss of the base on held-out images and noise of the group's timesteps, which no choice but
    that among the finalists has seen; so all losses here."""

    candidates: tuple[Candidate, ...]
    """All measured sub-models, best first: the finalists, then the others."""

    cost: SearchCost

    @property
    def widths(self) -> Scheme:
        """The scheme."""
        return widths_of(self.kept)

    @property
    def loss_cut(self) -> float:
        """The loss straight after pruning."""
        entry = self.entry
        return self.loss_base if entry is None else (entry.final or entry).loss_cut

    @property
    def loss_refit(self) -> float | None:
        """The loss after the refit; None without one."""
        entry = self.entry
        return None if entry is None else (entry.final or entry).loss_refit


def schemes_by_source(results: Sequence[SearchResult]) -> dict[str, int]:
    """Count the schemes that searches measured by who proposed them."""
    sources = (one.entry.source for result in results for one in result.candidates)
    return dict(sorted(Counter(sources).items()))


def contribution_notes(results: Sequence[SearchResult]) -> tuple[str, ...]:
    """Return what searches by a language model should say about its part in them."""
    found = schemes_by_source(results)
    asked = sum(number for source, number in found.items() if source.startswith("llm"))
    if not asked:
        return ("the language model contributed nothing: no scheme that was measured is its own",)
    chosen = [result.entry for result in results if result.entry is not None]
    own = sum(entry.is_by_llm for entry in chosen)
    if not own:
        return (
            f"no expert is the language model's: {asked} of its schemes were measured, and others "
            "were better",
        )
    return (f"{own} of {len(chosen)} pruned experts are the language model's",)

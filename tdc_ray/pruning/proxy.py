"""What a proxy is: anything that proposes pruning schemes for one group (TDC Eq. 7 and 11)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tdc_ray.execution.chain import Chain
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.quadratic_model import QuadraticModel
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import Scheme, Space

Sensitivities = Mapping[str, Mapping[int, float]]
"""For every unit, the increase of the loss by width when that unit alone is pruned to it, after
the refit if there is one. Small widths may be measured on models that are pruned elsewhere too
(``prune.num_passes``), or all are predicted (``prune.sensitivity``)."""


@dataclass(frozen=True, slots=True)
class ProposalRequest:
    """A request to a proxy: schemes for one group."""

    space: Space
    group: int
    timesteps: tuple[int, int]
    """First and last, both included."""

    snr_db: tuple[float, float]
    """Of the first and the last timestep, in dB."""

    limit: int
    """The limit: of macs, or of nanoseconds, as the space has it."""

    loss_base: float
    """Loss of the base on held-out noise of the group's timesteps."""

    scores: Mapping[str, Sequence[float]]
    """For every unit, the score of each of its groups or heads, 0 or more."""

    sensitivities: Sensitivities
    num_candidates: int
    """Number of schemes that are requested."""

    round: int
    """Their round, from 0."""

    num_rounds: int
    seed: int
    model: QuadraticModel | None = None
    """Predicts the growth of the loss with any scheme; None where sensitivities were measured."""

    pruned_elsewhere: Mapping[str, int] = field(default_factory=dict)
    """For units the widest width whose sensitivity was measured on a pruned model."""

    num_images: int = 0
    """Noised images that a finalist is measured on."""

    num_refit_images: int = 0
    """Noised images that a finalist is refitted from; 0 means that there is no refit."""

    images_share: float = 1.0
    """Share of both that proposed schemes are refitted from and measured on; see `race`."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A scheme that is to be measured."""

    source: str
    """Who proposed it; see :class:`MemoryEntry`."""

    scheme: Scheme
    hypothesis: str | None = None
    """What it is meant to show."""


class Round(Protocol):
    """One round of a group's search: what a proxy is asked, and its own measurements."""

    request: ProposalRequest
    memory: Sequence[MemoryEntry]
    """Entries that the proxy sees: of earlier rounds, and beside the offline proxy what that one
    had measured in this round."""

    @property
    def measured(self) -> list[MemoryEntry]:
        """Entries of the proxy in this round so far."""
        ...

    @property
    def left(self) -> int:
        """How many more schemes may be measured."""
        ...

    def measure(self, proposals: Sequence[Proposal]) -> Chain[list[MemoryEntry]]:
        """Measure schemes within the limit and return their entries.

        Those that the group has tried, and those for which no measurement is left, are left out.
        """
        ...


Proxy = Callable[[GroupSearch, Round, SearchCost], Chain[None]]
"""A chain that has schemes measured, the best guess first, until nothing is left of the round, or
it has no more, and adds its own cost to that of the search. A proxy that waits for something
outside yields an item."""

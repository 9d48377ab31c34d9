"""What a proxy is: anything that proposes pruning schemes for one group (TDC Eq. 7 and 11)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tdc_ray.execution.chain import Chain
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.result import SearchCost
from tdc_ray.pruning.space import Scheme, Space

Sensitivities = Mapping[str, Mapping[int, float]]
"""For every unit, widths below its own and by how much the loss grows when that unit alone is cut
to them, after the refit where there is one. What is far below may be measured on models that are
cut elsewhere too (``prune.num_passes``)."""


@dataclass(frozen=True, slots=True)
class ProposalRequest:
    """What a proxy is asked: schemes for one group."""

    space: Space
    group: int
    timesteps: tuple[int, int]
    """First and last, both included."""

    snr_db: tuple[float, float]
    """Of the first and the last timestep, in dB."""

    limit: int
    """The limit: of macs, or of nanoseconds, as the space has it."""

    loss_base: float
    """Loss of the uncut base on held-out noise of the group's timesteps."""

    scores: Mapping[str, Sequence[float]]
    """For every unit, the score of each of its groups or heads, 0 or more."""

    sensitivities: Sensitivities
    num_candidates: int
    """How many schemes are asked for."""

    round: int
    """The round that they are for, from 0."""

    num_rounds: int
    seed: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """A scheme that is to be measured."""

    source: str
    """Who proposed it; see :class:`MemoryEntry`."""

    scheme: Scheme
    overshoot: int = 0
    """By how much it was above the limit before it was fitted."""


Proxy = Callable[
    [GroupSearch, ProposalRequest, Sequence[MemoryEntry], SearchCost], Chain[list[Scheme]]
]
"""A chain that returns schemes for a request and what is remembered, best guess first, and adds
what that took to the cost of the search; whoever measures them fits them to the limit. A proxy
that waits for something outside yields an item."""

"""The plan: groups of timesteps, and each group's limit of macs (TDC Eq. 3 to 5)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.samplers import checked_timesteps, sampling_timesteps
from tdc_ray.diffusion.schedule import (
    FloatArray,
    NoiseProcess,
    nearest_timestep,
    nearest_timesteps,
)
from tdc_ray.errors import ConfigError

AFTER_STAGE_1 = (
    "limits are measured after stage 1, if anything is pruned; until then each is the mean"
)
"""Note of a plan whose schedule is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepGroup:
    """A range of timesteps that one expert serves."""

    index: int
    """Counted from 0 at the least noisy timesteps, over groups that are not empty."""

    first: int
    """First timestep."""

    last: int
    """Last timestep, included."""

    limit_share: float
    """Share of the base's macs that the expert may take, or of its time where
    ``prune.objective`` is latency, in (0, 1]."""

    snr_db_first: float
    """Signal-to-noise ratio at the first timestep, the group's highest, in dB."""

    snr_db_last: float
    """Signal-to-noise ratio at the last timestep, the group's lowest, in dB."""

    num_sampling_steps: int
    """How many steps of the planned sampler fall into the group."""

    @property
    def name(self) -> str:
        """Name of the group, in keys and tags."""
        return f"group-{self.index:02d}"

    @property
    def timesteps(self) -> range:
        """The group's timesteps."""
        return range(self.first, self.last + 1)

    def limit(self, base: int) -> int:
        """Compute the most that the expert may take, of the base's macs or of its nanoseconds."""
        # Rounding loses no mac: of shares that are round, or quotients of two costs.
        return math.floor(self.limit_share * base + 1e-6 + 1e-12 * base)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All groups, in the order of their timesteps, without a gap."""

    num_train_timesteps: int
    groups: tuple[TimestepGroup, ...]
    sampling_timesteps: tuple[float, ...]
    """Timesteps of the planned sampler, from the noisiest on, one for each evaluation of the
    network; one between two of training counts for the group of the nearer."""

    mean_limit_share: float
    """Mean over the sampling steps of the limit, as a share of the base's macs."""

    notes: tuple[str, ...]
    """Notes for the reader: groups that are empty, that were joined, that no sampling step falls
    into."""

    def group_of(self, timestep: float) -> TimestepGroup:
        """Return the group that holds a timestep, or the nearest one to it.

        Raises:
            ConfigError: The timestep is outside the plan.
        """
        for group in self.groups:
            if nearest_timestep(timestep) in group.timesteps:
                return group
        raise ConfigError(f"timestep must be in [0, {self.num_train_timesteps}), got {timestep}.")


@dataclass(frozen=True, slots=True)
class _Draft:
    """Timesteps [start, stop) and their share of the base, before the group's index is known."""

    start: int
    stop: int
    share: float

    @property
    def size(self) -> int:
        return self.stop - self.start

    def absorb(self, other: "_Draft") -> "_Draft":
        """Return a range that also has a neighbour's timesteps, at this one's share."""
        return _Draft(min(self.start, other.start), max(self.stop, other.stop), self.share)


def difficulty(snr_db: FloatArray) -> FloatArray:
    """Compute how hard every timestep is, from the easiest (0) to the hardest (1).

    TDC Eq. 3 takes the z-score of ``-snr_db`` and scales it to its own range; the z-score cancels
    out. The budget of a timestep is then ``k + (1 - k) * difficulty``, as a share of the base.

    Args:
        snr_db: Shape ``(T,)``, in dB, strictly decreasing.

    Returns:
        Shape ``(T,)``, unitless, strictly increasing from 0 to 1.
    """
    return np.asarray((snr_db[0] - snr_db) / (snr_db[0] - snr_db[-1]))


def limit_shares(num_groups: int, min_macs_share: float) -> FloatArray:
    """Compute the limits of the groups as shares of the base's macs.

    TDC Eq. 4 with its index moved by one, so that the last group's limit is the base itself::

        limit[i] = (i + 1) / N + (N - i - 1) / N * k

    Args:
        num_groups: The paper's N.
        min_macs_share: The paper's k, in [0, 1].

    Returns:
        Shape ``(N,)``, unitless, rising to 1.
    """
    upper = np.arange(1, num_groups + 1) / num_groups
    return np.asarray(upper + (1 - upper) * min_macs_share)


def one_group(
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    timesteps: tuple[int, int],
    limit_share: float,
) -> TimestepGroup:
    """Create a group of any timesteps, such as all of them.

    Args:
        diffusion: The noise process.
        sampler: Says which sampling steps fall into the group.
        timesteps: First and last, both included.
        limit_share: Share of the base's macs that it may take.

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: There are no such timesteps.
    """
    first, last = timesteps
    snr = NoiseProcess.of(diffusion).snr_db
    if not 0 <= first <= last < len(snr):
        raise ConfigError(f"timesteps must rise within 0 and {len(snr) - 1}, got {first} {last}.")
    steps = nearest_timesteps(sampling_timesteps(diffusion, sampler))
    return _group(0, _Draft(first, last + 1, limit_share), snr, steps)


def plan_groups(
    diffusion: DiffusionConfig,
    config: PlanConfig,
    sampler: SamplerConfig,
    *,
    check_start: bool = True,
) -> Plan:
    """Group the timesteps, and compute the limit of each group.

    With a measured schedule every group has the mean until :func:`with_limits` replaces it.

    Args:
        diffusion: The noise process.
        config: How the timesteps are grouped.
        sampler: How images are sampled.
        check_start: Whether steps that begin far below the last timestep are refused.

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: A mean limit was asked for that the schedule cannot have, or the sampler
            steps outside the timesteps.
    """
    timesteps_of = checked_timesteps if check_start else sampling_timesteps
    return plan_of(NoiseProcess.of(diffusion), config, timesteps_of(diffusion, sampler))


def plan_of(process: NoiseProcess, config: PlanConfig, visited: tuple[float, ...]) -> Plan:
    """Group the timesteps of a noise process; see :func:`plan_groups`.

    Args:
        process: The noise process.
        config: How the timesteps are grouped.
        visited: The timesteps at which images are sampled, noisiest first.

    Raises:
        ConfigError: A mean limit was asked for that the schedule cannot have.
    """
    snr, steps = process.snr_db, nearest_timesteps(visited)
    notes: list[str] = []
    by_snr, empty = _snr_groups(snr, config)
    before = by_snr
    if config.schedule.startswith("uni-"):
        before = _uniform_groups(len(snr), config, config.min_macs_share)
    elif empty:
        notes.append(
            f"of {config.num_groups} groups, number {', '.join(map(str, empty))} (from 0) is "
            "empty and vanishes"
        )
    by_snr, drafts = (_join_small(groups, config.min_group_size) for groups in (by_snr, before))
    if len(drafts) < len(before):
        notes.append(
            f"{len(before) - len(drafts)} group(s) under {config.min_group_size} timesteps joined "
            "a neighbour"
        )
    if config.schedule in ("constant", "measured"):
        mean = config.mean_macs_share or _mean_share(by_snr, steps)
        drafts = [dataclasses.replace(draft, share=mean) for draft in drafts]
    elif config.match_snr_mean:
        drafts = _match_mean(len(snr), config, _mean_share(by_snr, steps), steps)
    if config.schedule == "measured":
        notes.append(AFTER_STAGE_1)
    groups = tuple(_group(index, draft, snr, steps) for index, draft in enumerate(drafts))
    unvisited = [str(group.index) for group in groups if group.num_sampling_steps == 0]
    if unvisited:
        notes.append(
            f"no sampling step enters group {', '.join(unvisited)} "
            f"({len(steps)} steps over {len(snr)} timesteps)"
        )
    return Plan(
        num_train_timesteps=len(snr),
        groups=groups,
        sampling_timesteps=visited,
        mean_limit_share=_mean_share(drafts, steps),
        notes=tuple(notes),
    )


def with_limits(plan: Plan, shares: Sequence[float]) -> Plan:
    """Return a plan whose groups have other limits.

    Args:
        plan: The plan of a measured schedule.
        shares: Each group's limit as a share of the base's macs, in the groups' order.
    """
    groups = tuple(
        dataclasses.replace(group, limit_share=share)
        for group, share in zip(plan.groups, shares, strict=True)
    )
    total = math.fsum(group.num_sampling_steps * group.limit_share for group in groups)
    return dataclasses.replace(
        plan,
        groups=groups,
        mean_limit_share=total / len(plan.sampling_timesteps),
        notes=tuple(note for note in plan.notes if note != AFTER_STAGE_1),
    )


def _group(index: int, draft: _Draft, snr_db: FloatArray, steps: Sequence[int]) -> TimestepGroup:
    """Create a draft's group."""
    return TimestepGroup(
        index=index,
        first=draft.start,
        last=draft.stop - 1,
        limit_share=draft.share,
        snr_db_first=float(snr_db[draft.start]),
        snr_db_last=float(snr_db[draft.stop - 1]),
        num_sampling_steps=sum(draft.start <= step < draft.stop for step in steps),
    )


def _snr_groups(snr_db: FloatArray, config: PlanConfig) -> tuple[list[_Draft], list[int]]:
    """Group by difficulty (TDC Eq. 5); which timestep falls where does not depend on k.

    Returns:
        The groups, and the numbers, of all N, of those that are empty.
    """
    count = config.num_groups
    number = np.clip(np.ceil(difficulty(snr_db) * count).astype(int) - 1, 0, count - 1)
    bounds = np.searchsorted(number, np.arange(count + 1)).tolist()
    shares = limit_shares(count, config.min_macs_share).tolist()
    drafts = list(map(_Draft, bounds[:-1], bounds[1:], shares))
    empty = [i for i, draft in enumerate(drafts) if draft.size == 0]
    return [draft for draft in drafts if draft.size], empty


def _uniform_groups(num_timesteps: int, config: PlanConfig, min_macs_share: float) -> list[_Draft]:
    """Split into equal ranges of timesteps whose limits rise linearly to F, or fall from it."""
    count, shares = config.num_groups, limit_shares(config.num_groups, min_macs_share).tolist()
    if config.schedule == "uni-decreasing":
        shares.reverse()
    bounds = [num_timesteps * i // count for i in range(count + 1)]
    return list(map(_Draft, bounds[:-1], bounds[1:], shares))


def _match_mean(
    num_timesteps: int, config: PlanConfig, target: float, steps: Sequence[int]
) -> list[_Draft]:
    """Compute uniform groups whose limits have the target for a mean over the sampling steps."""

    def drafts(min_macs_share: float) -> list[_Draft]:
        uniform = _uniform_groups(num_timesteps, config, min_macs_share)
        return _join_small(uniform, config.min_group_size)

    # A limit is upper + (1 - upper) k, linear in k, so the mean can be solved for k.
    upper = _mean_share(drafts(0.0), steps)
    if upper == 1:  # one group, whose limit is F whatever k is
        return drafts(config.min_macs_share)
    k = (target - upper) / (1 - upper)
    if not 0 < k <= 1:
        raise ConfigError(
            f"plan.match_snr_mean cannot bring {config.schedule} to the SNR schedule's mean limit "
            f"{target:.4f} F: that needs plan.min_macs_share in (0, 1], it would be {k:.4f}. "
            "Raise plan.min_macs_share or plan.num_groups, or turn match_snr_mean off."
        )
    return drafts(k)


def _join_small(drafts: Sequence[_Draft], min_size: int) -> list[_Draft]:
    """Join groups of too few timesteps to the neighbour with the higher limit, the last downward.

    What is joined gets the limit of the neighbour that it joins.
    """
    falling = drafts[0].share > drafts[-1].share
    joined: list[_Draft] = []
    for draft in reversed(drafts) if falling else drafts:  # from the lowest limit up
        small = bool(joined) and joined[-1].size < min_size
        joined.append(draft.absorb(joined.pop()) if small else draft)
    if len(joined) > 1 and joined[-1].size < min_size:
        last = joined.pop()
        joined[-1] = joined[-1].absorb(last)
    return joined[::-1] if falling else joined


def _mean_share(drafts: Sequence[_Draft], steps: Sequence[int]) -> float:
    """Compute the mean, over the sampling steps, of the limit's share."""
    shares = [next(d.share for d in drafts if d.start <= step < d.stop) for step in steps]
    return math.fsum(shares) / len(shares)


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain JSON values."""
    return dataclasses.asdict(plan)

"""Budgets per timestep, the groups they form, each group's macs limit (TDC Eq. 3 to 5)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.samplers import sampling_timesteps
from tdc_ray.diffusion.schedule import FloatArray, NoiseProcess
from tdc_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepGroup:
    """A run of timesteps that one expert serves."""

    index: int
    """Place among the groups that are left, from the least noisy timesteps on."""

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
    def timesteps(self) -> range:
        """The group's timesteps."""
        return range(self.first, self.last + 1)

    def limit(self, base: int) -> int:
        """Give the most that the expert may take, of the base's macs or of its nanoseconds."""
        return math.floor(self.limit_share * base + 1e-6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All groups, in the order of their timesteps, without a gap."""

    num_train_timesteps: int
    groups: tuple[TimestepGroup, ...]
    sampling_timesteps: tuple[int, ...]
    """Timesteps of the planned sampler, from the noisiest on."""

    mean_limit_share: float
    """Mean over the sampling steps of the limit, as a share of the base's macs."""

    notes: tuple[str, ...]
    """What the reader should know: groups that vanished, that were joined, that no step enters."""

    def group_of(self, timestep: int) -> TimestepGroup:
        """Give the group that holds a timestep.

        Raises:
            ConfigError: The timestep is none of the plan's.
        """
        for group in self.groups:
            if group.first <= timestep <= group.last:
                return group
        raise ConfigError(f"timestep must be in [0, {self.num_train_timesteps}), got {timestep}.")


@dataclass(frozen=True, slots=True)
class _Draft:
    """A group before its index is known: timesteps [start, stop) and the share of its limit."""

    number: int
    """Place among all N groups."""

    start: int
    stop: int
    share: float

    @property
    def size(self) -> int:
        return self.stop - self.start

    def joined_by(self, other: "_Draft") -> "_Draft":
        start, stop = min(self.start, other.start), max(self.stop, other.stop)
        return dataclasses.replace(self, start=start, stop=stop)


def difficulty(snr_db: FloatArray) -> FloatArray:
    """Place of every timestep between the easiest (0) and the hardest (1).

    TDC Eq. 3 takes the z-score of ``-snr_db`` and scales it to its own range; the z-score cancels
    out. The budget of a timestep is then ``k + (1 - k) * difficulty``, as a share of the base.

    Args:
        snr_db: Shape ``(T,)``, in dB, strictly decreasing.

    Returns:
        Shape ``(T,)``, unitless, strictly increasing from 0 to 1.
    """
    return np.asarray((snr_db[0] - snr_db) / (snr_db[0] - snr_db[-1]))


def limit_shares(num_groups: int, min_macs_share: float) -> FloatArray:
    """Limits of the groups as shares of the base's macs.

    TDC Eq. 4 with its index moved by one, so that the last group's limit is the base itself::

        limit[i] = (i + 1) / N + (N - i - 1) / N * k

    Returns:
        Shape ``(N,)``, rising to 1.
    """
    upper = np.arange(1, num_groups + 1) / num_groups
    return np.asarray(upper + (1 - upper) * min_macs_share)


def one_group(
    diffusion: DiffusionConfig,
    sampler: SamplerConfig,
    timesteps: tuple[int, int],
    limit_share: float,
) -> TimestepGroup:
    """Make a group of any timesteps, such as all of them.

    Args:
        diffusion: The noise process.
        sampler: Tells which sampling steps fall into the group.
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
    steps = sampling_timesteps(len(snr), sampler)
    return TimestepGroup(
        index=0,
        first=first,
        last=last,
        limit_share=limit_share,
        snr_db_first=float(snr[first]),
        snr_db_last=float(snr[last]),
        num_sampling_steps=sum(first <= step <= last for step in steps),
    )


def plan_groups(diffusion: DiffusionConfig, config: PlanConfig, sampler: SamplerConfig) -> Plan:
    """Group the timesteps and give each group its limit.

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: A mean limit was asked for that the schedule cannot have, or the sampler
            steps outside the timesteps.
    """
    snr = NoiseProcess.of(diffusion).snr_db
    steps = sampling_timesteps(len(snr), sampler)
    if steps[0] >= len(snr):
        raise ConfigError(
            f"sampler.steps_offset {sampler.steps_offset} moves the first sampling step to "
            f"{steps[0]}, past the last timestep {len(snr) - 1}. Use 0, or fewer steps."
        )
    notes: list[str] = []
    by_snr = _snr_groups(snr, config)
    if config.schedule.startswith("uni-"):
        before = _uniform_groups(len(snr), config, config.min_macs_share)
    else:
        before = by_snr
        if len(by_snr) < config.num_groups:
            notes.append(_vanished(by_snr, config))
    by_snr = _join_small(by_snr, config.min_group_size)
    drafts = _join_small(before, config.min_group_size)
    if len(drafts) < len(before):
        notes.append(
            f"{len(before) - len(drafts)} group(s) under {config.min_group_size} timesteps joined "
            "a neighbour"
        )
    if config.schedule == "constant":
        mean = _mean_share(by_snr, steps)
        drafts = [dataclasses.replace(draft, share=mean) for draft in drafts]
    elif config.match_snr_mean:
        drafts = _matched(len(snr), config, _mean_share(by_snr, steps), steps)
    groups = tuple(
        TimestepGroup(
            index=index,
            first=draft.start,
            last=draft.stop - 1,
            limit_share=draft.share,
            snr_db_first=float(snr[draft.start]),
            snr_db_last=float(snr[draft.stop - 1]),
            num_sampling_steps=sum(draft.start <= step < draft.stop for step in steps),
        )
        for index, draft in enumerate(drafts)
    )
    idle = [str(group.index) for group in groups if group.num_sampling_steps == 0]
    if idle:
        notes.append(
            f"no sampling step enters group {', '.join(idle)} "
            f"({len(steps)} steps over {len(snr)} timesteps)"
        )
    return Plan(
        num_train_timesteps=len(snr),
        groups=groups,
        sampling_timesteps=steps,
        mean_limit_share=_mean_share(drafts, steps),
        notes=tuple(notes),
    )


def _snr_groups(snr: FloatArray, config: PlanConfig) -> list[_Draft]:
    """Group by difficulty (TDC Eq. 5); which timestep falls where does not depend on k."""
    count = config.num_groups
    member = np.clip(np.ceil(difficulty(snr) * count).astype(int) - 1, 0, count - 1)
    bounds = np.searchsorted(member, np.arange(count + 1))
    shares = limit_shares(count, config.min_macs_share)
    return [
        _Draft(i, int(bounds[i]), int(bounds[i + 1]), float(shares[i]))
        for i in range(count)
        if bounds[i] < bounds[i + 1]
    ]


def _vanished(drafts: Sequence[_Draft], config: PlanConfig) -> str:
    left = {draft.number for draft in drafts}
    empty = [str(number) for number in range(config.num_groups) if number not in left]
    return (
        f"of {config.num_groups} groups, number {', '.join(empty)} (from 0) is empty and vanishes"
    )


def _uniform_groups(num_timesteps: int, config: PlanConfig, min_macs_share: float) -> list[_Draft]:
    """Equal runs of timesteps whose limits rise linearly to F, or fall from it."""
    count, shares = config.num_groups, limit_shares(config.num_groups, min_macs_share)
    if config.schedule == "uni-decreasing":
        shares = shares[::-1]
    bounds = [num_timesteps * i // count for i in range(count + 1)]
    return [_Draft(i, bounds[i], bounds[i + 1], float(shares[i])) for i in range(count)]


def _matched(
    num_timesteps: int, config: PlanConfig, target: float, steps: Sequence[int]
) -> list[_Draft]:
    """Uniform groups with the k that gives their limits the target for a mean."""

    def drafts(min_macs_share: float) -> list[_Draft]:
        uniform = _uniform_groups(num_timesteps, config, min_macs_share)
        return _join_small(uniform, config.min_group_size)

    # A limit is place + (1 - place) k, linear in k, so the mean can be solved for k.
    place = _mean_share(drafts(0.0), steps)
    if place == 1:  # one group, whose limit is F whatever k is
        return drafts(config.min_macs_share)
    k = (target - place) / (1 - place)
    if not 0 < k <= 1:
        raise ConfigError(
            f"plan.match_snr_mean cannot bring {config.schedule} to the SNR schedule's mean limit "
            f"{target:.4f} F: that needs plan.min_macs_share in (0, 1], it would be {k:.4f}. "
            "Raise plan.min_macs_share or plan.num_groups, or turn match_snr_mean off."
        )
    return drafts(k)


def _join_small(drafts: Sequence[_Draft], min_size: int) -> list[_Draft]:
    """Join groups of too few timesteps to the neighbour with the higher limit, the last downward.

    What is joined takes the limit of the neighbour that it joins.
    """
    falling = drafts[0].share > drafts[-1].share
    joined: list[_Draft] = []
    for draft in reversed(drafts) if falling else drafts:  # from the lowest limit up
        small = bool(joined) and joined[-1].size < min_size
        joined.append(draft.joined_by(joined.pop()) if small else draft)
    if len(joined) > 1 and joined[-1].size < min_size:
        last = joined.pop()
        joined[-1] = joined[-1].joined_by(last)
    return joined[::-1] if falling else joined


def _mean_share(drafts: Sequence[_Draft], steps: Sequence[int]) -> float:
    shares = [next(d.share for d in drafts if d.start <= step < d.stop) for step in steps]
    return math.fsum(shares) / len(shares)


def to_json(plan: Plan) -> dict[str, Any]:
    """Give the plan as plain JSON values."""
    return dataclasses.asdict(plan)

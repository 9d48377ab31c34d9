"""Budgets per timestep, the groups they form, each group's macs limit (TDC Eq. 3 to 5)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdc_ray.config import DiffusionConfig, PlanConfig, SamplerConfig
from tdc_ray.errors import ConfigError
from tdc_ray.schedule import FloatArray, alphas_cumprod, betas, snr_db


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A run of timesteps that one expert serves."""

    index: int
    """Place among the groups that are left, from the least noisy timesteps on."""

    first: int
    """First timestep."""

    last: int
    """Last timestep, included."""

    limit_share: float
    """Share of the base's macs that the expert may take, in (0, 1]."""

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

    def max_macs(self, macs_base: int) -> int:
        """Give the most macs the expert may take, for a base of ``macs_base``."""
        return math.floor(self.limit_share * macs_base + 1e-6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All groups, in the order of their timesteps, without a gap."""

    num_train_timesteps: int
    groups: tuple[Group, ...]
    sampling_timesteps: tuple[int, ...]
    """Timesteps of the planned sampler, from the noisiest on."""

    mean_limit_share: float
    """Mean over the sampling steps of the limit, as a share of the base's macs."""

    notes: tuple[str, ...]
    """What the reader should know: groups that vanished, that were joined, that no step enters."""

    def group_of(self, timestep: int) -> Group:
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
    """A group before it has an index: timesteps [start, stop) and the share of its limit."""

    start: int
    stop: int
    share: float


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


def sampling_timesteps(
    num_train_timesteps: int, num_inference_steps: int, steps_offset: int
) -> tuple[int, ...]:
    """Timesteps that a sampler visits, noisiest first: diffusers' ``leading`` spacing."""
    stride = num_train_timesteps // num_inference_steps
    return tuple(i * stride + steps_offset for i in reversed(range(num_inference_steps)))


def plan_groups(diffusion: DiffusionConfig, config: PlanConfig, sampler: SamplerConfig) -> Plan:
    """Group the timesteps and give each group its limit.

    Raises:
        ScheduleError: The betas are no noise schedule.
        ConfigError: A mean limit was asked for that the schedule cannot have, or the sampler
            steps outside the timesteps.
    """
    snr = snr_db(
        alphas_cumprod(
            betas(
                diffusion.beta_schedule,
                diffusion.num_train_timesteps,
                beta_start=diffusion.beta_start,
                beta_end=diffusion.beta_end,
            )
        )
    )
    steps = sampling_timesteps(len(snr), sampler.num_inference_steps, sampler.steps_offset)
    if steps[0] >= len(snr):
        raise ConfigError(
            f"sampler.steps_offset {sampler.steps_offset} moves the first sampling step to "
            f"{steps[0]}, past the last timestep {len(snr) - 1}. Use 0, or fewer steps."
        )
    notes: list[str] = []
    by_snr = _join_small(_snr_groups(snr, config, notes), config.min_group_size, notes)
    if config.schedule == "snr":
        drafts = by_snr
    elif config.schedule == "constant":
        mean = _mean_share(by_snr, steps)
        drafts = [dataclasses.replace(draft, share=mean) for draft in by_snr]
    else:
        drafts = _uniform_groups(len(snr), config, by_snr, steps)
        drafts = _join_small(drafts, config.min_group_size, notes)
    groups = tuple(
        Group(
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


def _snr_groups(snr: FloatArray, config: PlanConfig, notes: list[str]) -> list[_Draft]:
    """Group by difficulty (TDC Eq. 5); which timestep falls where does not depend on k."""
    place = difficulty(snr)
    count = config.num_groups
    member = np.clip(np.ceil(place * count).astype(int) - 1, 0, count - 1)
    bounds = np.searchsorted(member, np.arange(count + 1))
    shares = limit_shares(count, config.min_macs_share)
    empty = [str(i) for i in range(count) if bounds[i] == bounds[i + 1]]
    if empty:
        notes.append(
            f"of {count} groups, number {', '.join(empty)} (from 0) is empty and vanishes"
        )
    return [
        _Draft(int(bounds[i]), int(bounds[i + 1]), float(shares[i]))
        for i in range(count)
        if bounds[i] < bounds[i + 1]
    ]


def _uniform_groups(
    num_timesteps: int, config: PlanConfig, by_snr: Sequence[_Draft], steps: Sequence[int]
) -> list[_Draft]:
    """Equal runs of timesteps whose limits rise (or fall) linearly to F (or from F)."""
    count = config.num_groups
    bounds = [num_timesteps * i // count for i in range(count + 1)]

    def drafts(min_macs_share: float) -> list[_Draft]:
        shares = limit_shares(count, min_macs_share)
        if config.schedule == "uni-decreasing":
            shares = shares[::-1]
        return [_Draft(bounds[i], bounds[i + 1], float(shares[i])) for i in range(count)]

    if not config.match_snr_mean:
        return drafts(config.min_macs_share)
    # The limit is linear in k: limit = place + (1 - place) k, so the mean can be solved for k.
    target, place = _mean_share(by_snr, steps), _mean_share(drafts(0.0), steps)
    k = (target - place) / (1 - place) if place < 1 else 0.0
    if not 0 < k <= 1:
        raise ConfigError(
            f"plan.match_snr_mean cannot bring {config.schedule} to the SNR schedule's mean limit "
            f"{target:.4f} F: that needs plan.min_macs_share in (0, 1], it would be {k:.4f}. "
            "Raise plan.min_macs_share or plan.num_groups, or turn match_snr_mean off."
        )
    return drafts(k)


def _join_small(drafts: list[_Draft], min_size: int, notes: list[str]) -> list[_Draft]:
    """Join groups of too few timesteps to the next one, the last to the one before it.

    A joined group takes its neighbour's limit. "The next" is the one of harder timesteps, which
    on the SNR schedule is the one with the higher limit.
    """
    joined: list[_Draft] = []
    start: int | None = None
    for draft in drafts:
        first = draft.start if start is None else start
        start = first if draft.stop - first < min_size else None
        if start is None:
            joined.append(_Draft(first, draft.stop, draft.share))
    if start is not None:  # the last ones were too few together
        if joined:
            joined[-1] = dataclasses.replace(joined[-1], stop=drafts[-1].stop)
        else:
            joined.append(_Draft(start, drafts[-1].stop, drafts[-1].share))
    if len(joined) < len(drafts):
        notes.append(
            f"{len(drafts) - len(joined)} group(s) under {min_size} timesteps joined a neighbour"
        )
    return joined


def _mean_share(drafts: Sequence[_Draft], steps: Sequence[int]) -> float:
    shares = [next(d.share for d in drafts if d.start <= step < d.stop) for step in steps]
    return math.fsum(shares) / len(shares)


def to_json(plan: Plan) -> dict[str, Any]:
    """Give the plan as plain JSON values."""
    return dataclasses.asdict(plan)

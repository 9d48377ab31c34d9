"""The search of one timestep group: its settings, and the paths and keys of its results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.errors import ConfigError
from tdc_ray.models.units import KeptIndices, kept_digest
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.space import Space


@dataclass(frozen=True, slots=True)
class GroupSearch:
    """One group's share of stage 2."""

    context: PruningContext
    space: Space
    group: TimestepGroup
    participants: frozenset[str] = frozenset()
    """Names of the chains of all groups that are pruned: they share the memory bank round by
    round."""

    @property
    def name(self) -> str:
        """Name of the group, in keys and tags."""
        return self.group.name

    @property
    def folder(self) -> Path:
        """Directory of its items' results."""
        return self.context.run_dir.group(self.group.index)

    @property
    def limit(self) -> int:
        """The limit: of macs, or of nanoseconds, as the space has it."""
        return self.group.limit(self.space.cost_base)

    @property
    def max_macs(self) -> int:
        """The limit in macs; where time is limited, an estimate of it."""
        return self.group.limit(self.space.macs_base)

    def check_space(self) -> None:
        """Check that the space is that of the settings.

        Raises:
            ConfigError: It limits something else, or other widths are legal in it.
        """
        prune, units = self.context.prune, self.space.units
        limited = "latency" if self.space.quantity == "time" else "macs"
        for setting, value, expected in (
            ("objective", prune.objective, limited),
            ("channel_multiple", prune.channel_multiple, max(unit.multiple for unit in units)),
        ):
            if prune.method != "none" and value != expected:
                raise ConfigError(
                    f"prune.{setting} must be {expected} here, got {value}: only tdc-ray run and "
                    "tdc-ray prune use others."
                )

    def key(self, name: str) -> str:
        """Return the key of an item of the search."""
        return f"{self.name}/{name}"

    def result_path(self, name: str, kept: KeptIndices | None = None) -> Path:
        """Return the path of an item's result, which has the digest of what is kept of the base.

        If other groups choose other schemes than in an earlier attempt, so may this one under the
        same name.
        """
        return self.folder / f"{name if kept is None else f'{name}-{kept_digest(kept)}'}.json"

    def cost_behind(self, num_candidates: int = 0) -> float:
        """Estimate the macs of measuring some candidates, and of what follows the search."""
        prune = self.context.prune
        images = prune.num_images + 3 * prune.num_refit_images * (prune.refit != "none")
        return (
            float(num_candidates * images * self.max_macs)
            + self.context.work_after * self.max_macs
        )


def group_searches(
    context: PruningContext, space: Space, groups: Sequence[TimestepGroup]
) -> list[GroupSearch]:
    """Create every group's search; no group waits for one that keeps the whole base."""
    searching = (group for group in groups if group.limit(space.cost_base) < space.cost_base)
    participants = frozenset(group.name for group in searching)
    return [GroupSearch(context, space, group, participants) for group in groups]

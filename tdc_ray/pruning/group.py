"""The search of one timestep group: what it works on, and the items that it is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.errors import ConfigError
from tdc_ray.execution.item import Inputs, Job, R, Report, WorkItem
from tdc_ray.models.units import KeptIndices, kept_digest
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.space import Space


def group_name(group: TimestepGroup) -> str:
    """Name a group, in keys and tags."""
    return f"group-{group.index:02d}"


@dataclass(frozen=True, slots=True)
class GroupSearch:
    """One group's share of stage 2."""

    context: PruningContext
    space: Space
    group: TimestepGroup
    participants: frozenset[str] = frozenset()
    """Names of the chains of all groups that have something to cut: they share the memory bank
    round by round."""

    @property
    def name(self) -> str:
        """Name of the group, in keys and tags."""
        return group_name(self.group)

    @property
    def folder(self) -> Path:
        """Where its items' results are."""
        return self.context.run_dir.group(self.group.index)

    @property
    def limit(self) -> int:
        """The limit: of macs, or of nanoseconds, as the space has it."""
        return self.group.limit(self.space.cost_base)

    @property
    def max_macs(self) -> int:
        """The limit's share of the base's macs; where time is limited about what is to be left."""
        return self.group.limit(self.space.macs_base)

    def check_space(self) -> None:
        """Make sure that the space is that of the settings.

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

    def item(
        self,
        name: str,
        function: Callable[[Job, Report], R | None],
        job: Job,
        *,
        result_type: type[R],
        cost: float = 0.0,
        behind: float = 0.0,
        num_steps: int = 1,
        kept: KeptIndices | None = None,
        inputs: Callable[[Job], Inputs | None] | None = None,
        files: tuple[Path, ...] = (),
        service: str | None = None,
        fallback_result: R | None = None,
    ) -> WorkItem[Job, R]:
        """Make an item of the search; see ``WorkItem``.

        Args:
            name: Its name within the group.
            function: What to call.
            job: With what.
            result_type: What it returns.
            cost: Expected macs.
            behind: Expected macs of the search after it; those of what follows it are added.
            num_steps: Steps that it reports.
            kept: The choice that it is about, which its result is named after: where others
                choose other schemes than in an earlier attempt, so may this group, at the same
                place.
            inputs: Returns what the result follows from; None means that no other run may use it.
            files: What it writes beside its result.
            service: What runs it in place of a worker.
            fallback_result: Its result where the service is lost.
        """
        file = name if kept is None else f"{name}-{kept_digest(kept)}"
        return WorkItem(
            key=f"{self.name}/{name}",
            function=function,
            job=job,
            result_path=self.folder / f"{file}.json",
            cost=cost,
            cost_behind=behind + self.context.work_after * self.max_macs,
            num_steps=num_steps,
            inputs=inputs,
            files=files,
            service=service,
            fallback_result=fallback_result,
            result_type=result_type,
        )


def group_searches(
    context: PruningContext, space: Space, groups: Sequence[TimestepGroup]
) -> list[GroupSearch]:
    """Make every group's search; no group waits for one that keeps the whole base."""
    searching = (group for group in groups if group.limit(space.cost_base) < space.cost_base)
    participants = frozenset(map(group_name, searching))
    return [GroupSearch(context, space, group, participants) for group in groups]

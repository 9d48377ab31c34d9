"""One group's share of stage 2: what is asked of it, and what its search comes to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.errors import ConfigError
from tdc_ray.execution.item import UNTYPED, Inputs, Job, R, Report, Result, WorkItem
from tdc_ray.models.units import KeptIndices, kept_digest, widths_of
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.space import Scheme, Space
from tdc_ray.storage.run_dir import RunDir


def group_name(group: TimestepGroup) -> str:
    """Name a group, in keys and tags."""
    return f"group-{group.index:02d}"


@dataclass(frozen=True, slots=True)
class GroupSearch:
    """One group's share of stage 2."""

    run_dir: RunDir
    config: RunConfig
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
        prune, units = self.config.prune, self.space.units
        limited = "latency" if self.space.quantity == "time" else "macs"
        for setting, value, wanted in (
            ("objective", prune.objective, limited),
            ("channel_multiple", prune.channel_multiple, max(unit.multiple for unit in units)),
        ):
            if prune.method != "none" and value != wanted:
                raise ConfigError(
                    f"prune.{setting} must be {wanted} here, got {value}: only tdc-ray run and "
                    "tdc-ray prune heed others."
                )

    @property
    def finetune_macs(self) -> float:
        """Macs that the fine-tune will take at most: forward and backward count three forwards."""
        train = self.config.finetune
        return 3.0 * self.max_macs * train.num_steps * train.batch_size

    def item(
        self,
        name: str,
        function: Callable[[Job, Report], R | None],
        job: Job,
        *,
        result_type: type[R] = UNTYPED,
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
            behind: Expected macs of the search after it; the fine-tune's are added.
            num_steps: Steps that it reports.
            kept: The choice that it is about, which its result is named after: where others come
                to other schemes than in an earlier attempt, so may this group, at the same place.
            inputs: Gives of the job what the result follows from; None: no other run may take it.
            files: What it leaves beside its result.
            service: What runs it in place of a worker.
            fallback_result: Its result where the service is lost.
        """
        file = name if kept is None else f"{name}-{kept_digest(kept)}"
        return WorkItem(
            key=f"{self.name}/{name}",
            function=function,
            job=job,
            result_path=self.run_dir.group(self.group.index) / f"{file}.json",
            cost=cost,
            cost_behind=behind + self.finetune_macs,
            num_steps=num_steps,
            inputs=inputs,
            files=files,
            service=service,
            fallback_result=fallback_result,
            result_type=result_type,
        )


def group_tasks(
    run_dir: RunDir, config: RunConfig, space: Space, groups: Sequence[TimestepGroup]
) -> list[GroupSearch]:
    """Give every group its task; no group waits for one that keeps the whole base."""
    searching = (group for group in groups if group.limit(space.cost_base) < space.cost_base)
    participants = frozenset(map(group_name, searching))
    return [GroupSearch(run_dir, config, space, group, participants) for group in groups]


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
    """What did not go as asked for."""

    def add(self, result: Result) -> None:
        """Count an item that computed."""
        self.macs += result["macs"]
        self.seconds += result["seconds"]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The sub-model that a group's expert starts from."""

    kept: KeptIndices
    entry: MemoryEntry | None
    """What is remembered of it; None for the base itself, which nothing is cut of."""

    loss_base: float
    """Loss of the uncut base on held-out images and noise of the group's timesteps."""

    candidates: tuple[Candidate, ...]
    """All that were measured, best first."""

    spent: SearchCost

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

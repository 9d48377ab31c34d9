"""Events of a run beside those of its work; see ``tdc_ray.execution.events``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_ray.diffusion.plan import Plan
from tdc_ray.execution.events import EventSink
from tdc_ray.execution.timeline import History, WorkerUsage
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.runs.results import Results
from tdc_ray.storage.run_dir import RunDir

SinksFor = Callable[[RunDir], Sequence[EventSink]]
"""Creates the sinks of a run; a module-level function, so that it can be sent to a trial."""


def no_sinks(_run_dir: RunDir) -> Sequence[EventSink]:
    """Return no sinks."""
    return ()


@dataclass(frozen=True, slots=True)
class SettingsSaved:
    """The settings are written, of ``--hours`` once steps were timed; emitted at every start."""

    document: Mapping[str, Any]
    """As plain JSON values."""


@dataclass(frozen=True, slots=True)
class PlanMade:
    """The timesteps are grouped; emitted at every start of a run."""

    plan: Plan


@dataclass(frozen=True, slots=True)
class CandidateMeasured:
    """A candidate is in the memory bank; emitted again at every later start."""

    entry: MemoryEntry
    step: int
    """Which of its group's candidates it is, counted from 1, were all rounds full."""


@dataclass(frozen=True, slots=True)
class ImagesSampled:
    """A model's images were scored."""

    model: str
    """``base``, ``tdc`` or ``longer-base``; ``real`` are training images."""

    path: Path
    """The first of their files."""


@dataclass(frozen=True, slots=True)
class WorkersUsed:
    """All work is done: the timeline, and how well each phase used the workers."""

    history: History
    usage: Sequence[WorkerUsage]


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The results are written."""

    results: Results

"""``tdc_ray.load_experts``: experts of a base, saved and loaded, and what is known of them."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from pydantic import TypeAdapter

from tdc_ray.cli.api.base import Base, base_of
from tdc_ray.cli.api.folder import TemporaryFolder
from tdc_ray.config.run import RunConfig, from_json, to_json
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.diffusion.pipeline_index import EXPERTS_FILE, PipelineIndex
from tdc_ray.diffusion.plan import Plan
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.reporting.text import loss_text, macs_text, millions_text, timesteps_text
from tdc_ray.runs.pretrained.importer import import_base
from tdc_ray.runs.pretrained.sources import resolve_base
from tdc_ray.runs.results import GroupResult, load_checked, load_results
from tdc_ray.storage.files import atomic_path, exists, fetch, listing, read_json, write_json
from tdc_ray.storage.object_store import display_path, is_remote, resolve_path
from tdc_ray.storage.run_dir import RunDir

BASE_DIR = "base"
"""Folder of the base in it."""

FORMAT = 1

HEADER = ("timesteps", "macs limit", "macs", "parameters", "base", "cut", "refit", "fine-tuned")
"""Columns of the table of experts; the last four are losses."""


@dataclass(frozen=True, eq=False)
class Experts:
    """Experts of a base, one for each group of timesteps. As text it is a table of them."""

    base: Base
    plan: Plan
    """The groups and their limits."""

    groups: tuple[GroupResult, ...] = field(repr=False)
    """What is kept of the base in each group, and the losses on held-out images and noise."""

    config: RunConfig = field(repr=False)
    """The settings that they were made by."""

    folder: Path = field(repr=False)
    """Where they are, as a pipeline."""

    temporary: TemporaryFolder | None = field(default=None, repr=False)
    """Holds the folder if nobody named another."""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> UNet2DModel:
        """Load a group's expert, in eval mode, on the CPU."""
        return load_expert(self.folders[index])

    def __str__(self) -> str:
        rows = [HEADER]
        rows += [
            (
                timesteps_text(group.timesteps),
                macs_text(group.macs_limit),
                macs_text(group.macs),
                millions_text(group.num_params),
                loss_text(group.loss_base),
                loss_text(group.loss_cut),
                loss_text(group.loss_refit),
                loss_text(group.loss_finetuned) if group.train_steps else "",
            )
            for group in self.groups
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        return "\n".join(lines)

    @property
    def folders(self) -> list[Path]:
        """Where each expert is, in the groups' order."""
        return [self.folder / entry.folder for entry in PipelineIndex.load(self.folder).experts]

    def to_pipeline(self, **options: Any) -> ProgressivePipeline:
        """Load the pipeline; ``options`` are those of ``ProgressivePipeline.from_pretrained``."""
        pipeline = ProgressivePipeline.from_pretrained(self.folder, **options)
        pipeline.holds = self.temporary  # reads experts later with offload, and when it is saved
        return pipeline

    def to_denoiser(self, **options: Any) -> ExpertDenoiser:
        """Load them as one network that takes the base's place in any pipeline of diffusers.

        ``options`` are those of ``ExpertDenoiser.from_pretrained``.
        """
        return ExpertDenoiser.from_pretrained(self.folder, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save experts and base, which :func:`load_experts` loads.

        The folder is a pipeline's, too: ``ProgressivePipeline.from_pretrained`` loads it.

        Args:
            folder: A new or empty folder, or one that this wrote before; or its URI.

        Raises:
            ConfigError: It is something else.
        """
        folder = resolve_path(folder)
        is_file = not is_remote(folder) and folder.is_file()
        if is_file or (listing(folder, "*") and not exists(folder / EXPERTS_FILE)):
            raise ConfigError(
                f"save_pretrained needs a new folder, or one that it wrote before, got "
                f"{display_path(folder)}, which is something else. Name another."
            )
        document = {
            "format": FORMAT,
            "config": to_json(self.config),
            "plan": asdict(self.plan),
            "groups": [asdict(group) for group in self.groups],
        }
        with atomic_path(folder) as temporary:
            # The experts may be in this very folder, and the base.
            no_base = shutil.ignore_patterns(BASE_DIR, ".*")
            shutil.copytree(fetch(self.folder), temporary, ignore=no_base)
            import_base(self.base.pretrained, self.base.config, temporary / BASE_DIR)
            write_json(temporary / EXPERTS_FILE, document)


@dataclass(frozen=True, slots=True)
class _Saved:
    """The content of ``experts.json``."""

    format: int
    config: dict[str, Any]
    plan: Plan
    groups: tuple[GroupResult, ...]


_SAVED, _PLAN = TypeAdapter(_Saved), TypeAdapter(Plan)


def load_experts(folder: str | Path) -> Experts:
    """Load experts that ``save_pretrained`` saved, or those of a finished run.

    Args:
        folder: The folder, or the run directory; or its URI.

    Raises:
        CheckpointError: It holds none.
        StorageError: It is of another version, or malformed.
    """
    root = resolve_path(folder)
    run_dir = RunDir(root if is_remote(root) else root.absolute())
    if exists(run_dir.root / EXPERTS_FILE):
        saved = load_checked(run_dir.root / EXPERTS_FILE, _SAVED, "format", FORMAT)
        base = base_of(resolve_base(display_path(run_dir.base)), from_json(saved.config))
        return Experts(base, saved.plan, saved.groups, base.config, run_dir.root)
    if exists(run_dir.results):
        config, groups = from_json(read_json(run_dir.config)), load_results(run_dir.results).groups
        base = base_of(resolve_base(display_path(run_dir.root)), config)
        plan = _PLAN.validate_python(read_json(run_dir.plan))
        return Experts(base, plan, groups, base.config, run_dir.experts)
    if not is_remote(root) and not root.exists():
        raise CheckpointError(f"{root} does not exist.")
    raise CheckpointError(
        f"{display_path(root)} holds no experts and their base: neither {EXPERTS_FILE}, of "
        f"save_pretrained, nor {run_dir.results.name}, of a finished run, is there. "
        "(ProgressivePipeline.from_pretrained loads a pipeline of experts.)"
    )

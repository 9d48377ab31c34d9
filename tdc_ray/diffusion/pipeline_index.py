"""``progressive.json``: what makes a folder of experts a pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from tdc_ray.config.conditioning import ConditioningConfig
from tdc_ray.config.data import DataConfig
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.config.validation import config_error
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.errors import CheckpointError, ConfigError, StorageError, is_from_outside
from tdc_ray.models.first_stage import copy_first_stage, input_shape
from tdc_ray.storage.files import exists, read_json, write_json
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import FIRST_STAGE_DIR

INDEX_FILE = "progressive.json"

EXPERTS_FILE = "experts.json"
"""File of a folder of experts that has their base, too, which a pipeline does not hold."""


class ExpertEntry(BaseModel, frozen=True):
    """One expert, and the timesteps that it serves."""

    folder: str
    first: int
    last: int
    """Included."""


class PipelineIndex(BaseModel, frozen=True, ser_json_inf_nan="constants"):
    """Which expert serves which timesteps, and how to sample with them."""

    format: Literal[1] = 1
    shape: tuple[int, int, int]
    """``(C, H, W)`` of what the experts output."""

    first_stage: str | None = None
    """Folder of the first stage, seen from the index's own; None where experts output images."""

    diffusion: DiffusionConfig
    sampler: SamplerConfig
    num_classes: int | None = None
    """Without the null class; None for unconditional experts."""

    text_encoder: str | None = None
    """Folder of the pipeline that encodes prompts, which stays where it is; None for experts that
    are not conditioned on text."""

    experts: tuple[ExpertEntry, ...]

    @classmethod
    def of(
        cls,
        data: DataConfig,
        diffusion: DiffusionConfig,
        sampler: SamplerConfig,
        conditioning: ConditioningConfig,
        experts: Mapping[str, TimestepGroup] | None = None,
    ) -> "PipelineIndex":
        """Describe models that were trained with these settings.

        Args:
            data: Names the first stage and the text encoder, which stay where they are.
            diffusion: The noise process.
            sampler: How to sample when a call does not say.
            conditioning: The classes.
            experts: The group of each expert's folder, in order; None for the base.
        """
        return cls(
            shape=input_shape(data),
            first_stage=data.first_stage,
            diffusion=diffusion,
            sampler=sampler,
            num_classes=conditioning.num_classes,
            text_encoder=data.text_encoder,
            experts=tuple(
                ExpertEntry(folder=folder, first=group.first, last=group.last)
                for folder, group in (experts or {}).items()
            ),
        )

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last timestep of every expert."""
        return [(expert.first, expert.last) for expert in self.experts]

    def save(self, folder: Path) -> None:
        """Write the index into the experts' folder.

        A first stage is copied into it, so that the folder needs nothing from elsewhere.
        """
        changes = {}
        if self.first_stage is not None:
            copy_first_stage(Path(self.first_stage), folder / FIRST_STAGE_DIR)
            changes["first_stage"] = FIRST_STAGE_DIR
        write_json(folder / INDEX_FILE, self.to_json() | changes)

    def to_json(self) -> dict[str, Any]:
        """Return the index as plain JSON values, which earlier versions read where they can."""
        newer = {"text_encoder"} if self.text_encoder is None else None
        return self.model_dump(mode="json", exclude=newer)

    @classmethod
    def load(cls, folder: Path) -> "PipelineIndex":
        """Read the index of a folder of experts.

        Raises:
            CheckpointError: It is missing, of another format, or malformed.
        """
        path = folder / INDEX_FILE
        try:
            return cls.model_validate(read_json(path), extra="forbid")
        except (ValidationError, ConfigError, StorageError) as error:
            if is_from_outside(error):
                raise
            reason = config_error(error) if isinstance(error, ValidationError) else error
            raise CheckpointError(f"{display_path(path)} is malformed: {reason}") from error


def experts_folder(path: Path) -> Path:
    """Return the folder of a pipeline's experts: that itself, or the one in a run or an export.

    Raises:
        CheckpointError: There is none.
    """
    for folder in (path, path / "experts"):
        if exists(folder / INDEX_FILE):
            return folder
    raise CheckpointError(
        f"{display_path(path)} holds no experts: {INDEX_FILE} is missing. Finish the run first."
    )

"""What stage 1 leaves beside weights: its result, and how far its checkpoints are."""

from dataclasses import dataclass

STEP_FILE = "step.json"
"""Beside the state in a checkpoint: ``{"step": ...}``, to be read without it."""


@dataclass(frozen=True, slots=True)
class BaseResult:
    """The size of the base, and the cost of its training."""

    macs: int
    num_params: int
    train_steps: int
    train_macs: float
    """Three forward passes per image seen."""

    seconds: float

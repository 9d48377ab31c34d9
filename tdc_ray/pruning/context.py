"""The settings that pruning reads, and where the base is."""

from dataclasses import dataclass
from pathlib import Path

from tdc_ray.config.conditioning import ConditioningConfig
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.config.prune import PruneConfig
from tdc_ray.data.latents import TrainingData
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningContext:
    """What the searches of all groups have in common; every job of theirs carries it."""

    run_dir: RunDir
    """It has the base; results and the memory bank are written there."""

    seed: int
    data: TrainingData
    diffusion: DiffusionConfig

    conditioning: ConditioningConfig
    """Results follow from it, as the base does."""

    prune: PruneConfig
    proxy: ProxyConfig
    tf32: bool
    models_all_groups: bool = False
    """Whether budgets are shared by quadratic models of all groups, also of those that are not
    pruned."""

    work_after: float = 0.0
    """Work after a group's search, in forward passes of its sub-model for one image."""

    base_checkpoint: Path | None = None
    """Stage 1's last checkpoint, where fine-tunes begin with its moments; None means that there is
    none, or that they do not."""

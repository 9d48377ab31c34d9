"""``RunConfig`` composes the stages' settings; to and from JSON."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tdc_ray.errors import ConfigError
from tdc_ray.settings import (
    ComputeConfig,
    DataConfig,
    DiffusionConfig,
    EvaluateConfig,
    ModelConfig,
    PlanConfig,
    PruneConfig,
    SamplerConfig,
    TrainConfig,
    require,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides what a run computes, and where."""

    preset: str = "digits"
    """Name of the preset that the settings started from."""

    seed: int = 0
    """Seed of everything random in training, pruning and fine-tuning."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    base: TrainConfig = field(default_factory=TrainConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    finetune: TrainConfig = field(default_factory=TrainConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        self.base.check("base")
        self.finetune.check("finetune")
        timesteps, workers = self.diffusion.num_train_timesteps, self.compute.num_base_workers
        rule = f"at most diffusion.num_train_timesteps = {timesteps}"
        few = self.sampler.num_inference_steps <= timesteps
        require("sampler", self.sampler, "num_inference_steps", rule, ok=few)
        require("plan", self.plan, "num_groups", rule, ok=self.plan.num_groups <= timesteps)
        rule = f"a multiple of compute.num_base_workers = {workers}"
        require("base", self.base, "batch_size", rule, ok=self.base.batch_size % workers == 0)
        if self.sampler.sampler == "ddpm" and self.sampler.eta:
            raise ConfigError(
                f"sampler.eta goes with sampler.sampler ddim, got {self.sampler.eta} with ddpm. "
                "Leave it at 0."
            )


_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def to_json(config: RunConfig) -> dict[str, Any]:
    """Give the settings as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(document: object) -> RunConfig:
    """Read what :func:`to_json` gave.

    Raises:
        ConfigError: A setting is unknown, of another type, or out of its range.
    """
    try:
        return _ADAPTER.validate_python(document, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(str(part) for part in first["loc"]) or "the settings"
        raise ConfigError(f"{setting}: {first['msg']}, got {first['input']!r}.") from error


def digest(config: RunConfig) -> str:
    """Eight hexadecimal digits that name all settings but those of the cluster."""
    document = to_json(config) | {"compute": None}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:8]


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Name every setting, but those of the cluster, in which two configs differ."""
    found: list[str] = []

    def compare(path: str, left: object, right: object) -> None:
        if isinstance(left, dict) and isinstance(right, dict):
            for key in left:
                compare(f"{path}.{key}" if path else key, left[key], right[key])
        elif left != right:
            found.append(f"{path} {left} -> {right}")

    compare("", to_json(one) | {"compute": None}, to_json(other) | {"compute": None})
    return found


def default_run_dir(config: RunConfig) -> Path:
    """Where a run goes that names no directory: the same settings give the same place."""
    return Path("runs") / f"{config.preset}-seed{config.seed}-{digest(config)}"

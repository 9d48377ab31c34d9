"""``RunConfig`` composes the stages' settings; to and from JSON."""

import dataclasses
from collections.abc import Collection
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tdc_ray.config.budget import BudgetConfig
from tdc_ray.config.compare import CompareConfig
from tdc_ray.config.compute import RESULT_FIELDS, ComputeConfig
from tdc_ray.config.conditioning import ConditioningConfig
from tdc_ray.config.data import BASE_SAMPLES, DataConfig
from tdc_ray.config.diffusion import LATER_DIFFUSION_FIELDS, DiffusionConfig
from tdc_ray.config.evaluate import EvaluateConfig
from tdc_ray.config.image_size import size_text
from tdc_ray.config.model import FILE_KINDS, ModelConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.sampler import LATER_SAMPLER_FIELDS, SamplerConfig
from tdc_ray.config.train import FinetuneConfig, TrainConfig
from tdc_ray.config.validation import config_error, refuse, require, settings
from tdc_ray.errors import ConfigError
from tdc_ray.storage.digest import json_digest
from tdc_ray.storage.files import exists, read_json
from tdc_ray.storage.object_store import is_remote, resolve_path


@settings()
class RunConfig:
    """Everything that decides what a run computes, and where."""

    preset: str = "digits"
    """Name of the preset that the settings started from."""

    seed: int = 0
    """Seed of everything random in training, pruning and fine-tuning."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    base: TrainConfig = field(default_factory=TrainConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        self.base.check("base")
        self.finetune.check("finetune")
        timesteps, workers = self.diffusion.num_train_timesteps, self.compute.num_base_workers
        rule = f"at most diffusion.num_train_timesteps = {timesteps}"
        fits = self.sampler.num_inference_steps <= timesteps
        require("sampler", self.sampler, "num_inference_steps", rule, ok=fits)
        require("plan", self.plan, "num_groups", rule, ok=self.plan.num_groups <= timesteps)
        rule = f"a multiple of compute.num_base_workers = {workers}"
        require("base", self.base, "batch_size", rule, ok=self.base.batch_size % workers == 0)
        if self.sampler.scheduler is None and self.sampler.sampler != "ddim" and self.sampler.eta:
            refuse(
                f"sampler.eta goes with sampler.sampler ddim, got {self.sampler.eta} with "
                f"{self.sampler.sampler}. Leave it at 0."
            )
        clips, sampler = self.sampler.use_clipped_model_output, self.sampler.sampler
        if self.sampler.scheduler is None and sampler != "ddim" and clips:
            refuse(
                "sampler.use_clipped_model_output goes with sampler.sampler ddim, got it with "
                f"{sampler}. Leave it out."
            )
        if self.sampler.scheduler is None and self.sampler.sampler == "pndm":
            rule = "ddim, ddpm or dpmsolver++ with diffusion.prediction_type sample"
            fits = self.diffusion.prediction_type != "sample"
            require("sampler", self.sampler, "sampler", rule, ok=fits)
        if self.budget.hours is not None and self.sampler.compile != "none":
            refuse(
                "sampler.compile must be none with --hours, which times no compiled sampling, got "
                f"{self.sampler.compile}. Leave one of them out."
            )
        rule = "new with model.base, which comes without its optimizer"
        known = self.model.base is None or self.finetune.optimizer_state == "new"
        require("finetune", self.finetune, "optimizer_state", rule, ok=known)
        rule = "False with model.base, which is trained already"
        untrained = self.model.base is None or not self.prune.held_out_of_base
        require("prune", self.prune, "held_out_of_base", rule, ok=untrained)
        self._check_models_of_all_groups()
        self._check_sharding()
        self._check_finetune_workers()
        self._check_comparison_workers()
        rule = "None where images are not square, as clean-fid's statistics are of squares"
        square = self.data.height == self.data.width or self.evaluate.reference is None
        require("evaluate", self.evaluate, "reference", rule, ok=square)
        self._check_base_samples()
        self._check_latents()

    @property
    def measures_limits(self) -> bool:
        """Whether limits follow from models of the loss; without pruning there are none."""
        return self.plan.schedule == "measured" and self.prune.method != "none"

    @property
    def models_all_groups(self) -> bool:
        """Whether budgets are shared by quadratic models of all groups."""
        return self.measures_limits or self.finetune.allocation == "excess"

    def _check_models_of_all_groups(self) -> None:
        """Refuse budgets that are shared by models of the loss where none are made."""
        excess = self.finetune.allocation == "excess"
        setting = "finetune.allocation excess" if excess else "plan.schedule measured"
        has_model = self.prune.space != "full" or not self.models_all_groups
        rule = (
            f"inner or depth with {setting}: a stream's width has no quadratic model of the loss"
        )
        require("prune", self.prune, "space", rule, ok=has_model)
        rule = "equal or timesteps with prune.method none, which cuts nothing that costs"
        fits = not excess or self.prune.method != "none"
        require("finetune", self.finetune, "allocation", rule, ok=fits)

    def _check_sharding(self) -> None:
        """Refuse to share a base among workers where there is one, or that is compiled."""
        if self.compute.sharding == "none":
            return
        rule = f"at least 2 with compute.sharding {self.compute.sharding}"
        several = self.compute.num_base_workers > 1
        require("compute", self.compute, "num_base_workers", rule, ok=several)
        rule = f"none with compute.sharding {self.compute.sharding}"
        require("base", self.base, "compile", rule, ok=self.base.compile == "none")

    def _check_finetune_workers(self) -> None:
        """Refuse batches that the workers of a fine-tune cannot share evenly."""
        workers, size = self.compute.workers_per_finetune, self.finetune.batch_size
        rule = f"a multiple of compute.workers_per_finetune = {workers}"
        require("finetune", self.finetune, "batch_size", rule, ok=size % workers == 0)
        most, gpus = self.compute.num_actors, self.compute.gpus_per_actor
        rule = f"at most compute.num_actors = {most}"
        enough = most is None or workers <= most
        require("compute", self.compute, "workers_per_finetune", rule, ok=enough)
        rule = "whole, or 0, with compute.workers_per_finetune above 1 (NCCL shares no GPU)"
        whole = workers == 1 or gpus is None or gpus == int(gpus)
        require("compute", self.compute, "gpus_per_actor", rule, ok=whole)

    def _check_comparison_workers(self) -> None:
        """Refuse fewer actors than train the base on side by side."""
        workers, most = self.compute.num_base_workers, self.compute.num_actors
        rule = f"at most compute.num_actors = {most} with compare.kind {self.compare.kind}"
        enough = self.compare.kind == "none" or most is None or workers <= most
        require("compute", self.compute, "num_base_workers", rule, ok=enough)

    def _check_base_samples(self) -> None:
        """Refuse what images of a data set alone can be used for."""
        if self.data.source != BASE_SAMPLES:
            return
        rule = "none with data.source base, as no base is trained on by its own samples"
        require("compare", self.compare, "kind", rule, ok=self.compare.kind == "none")
        rule = "None with data.source base, where scores are against the base's own samples"
        named = self.evaluate.reference is not None
        require("evaluate", self.evaluate, "reference", rule, ok=not named)

    def _check_latents(self) -> None:
        """Refuse what is right for pixels and wrong for latents."""
        if self.data.first_stage is None:
            return
        vlb_weight = self.diffusion.vlb_weight if self.diffusion.learned_sigma else 0.0
        for setting, value, reason in (
            ("sampler.clip_sample", self.sampler.clip_sample, "latents lie outside [-1, 1]"),
            ("diffusion.vlb_weight", vlb_weight, "L_vlb is of 8-bit pixels"),
            ("data.horizontal_flip", self.data.horizontal_flip, "latents are cached as they are"),
            ("data.crop_padding", self.data.crop_padding, "latents are cached as they are"),
        ):
            if value:
                refuse(
                    f"{setting} must be {type(value)()} with data.first_stage, got {value}: "
                    f"{reason}."
                )


PATHS = (
    "data.path",
    "data.prompts",
    "data.cache_dir",
    "data.text_encoder",
    "data.first_stage",
    "model.base",
    "model.config",
    "proxy.replay",
    "evaluate.cache_dir",
    "evaluate.features_model",
    "evaluate.inception_path",
)
"""Settings that are paths, or may be."""

LATER_FIELDS = {
    "data": ("num_images", "prompts", "text_encoder"),
    "conditioning": ("caption_dropout",),
    "diffusion": LATER_DIFFUSION_FIELDS,
    "model": (
        "width",
        "depth",
        "network",
        "num_head_channels",
        "num_heads_upsample",
        "use_new_attention_order",
    ),
    "budget": ("hours", "train_macs", "epochs"),
    "prune": ("rivals", "held_out_of_base"),
    "sampler": LATER_SAMPLER_FIELDS,
    "proxy": ("base_url", "max_predictions", "stream"),
    "evaluate": ("metrics", "features_model"),
    "compute": ("sharding",),
}
"""Settings that came after the first run directories were named by their digest."""

_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def to_json(config: RunConfig) -> dict[str, Any]:
    """Return the settings as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(document: object) -> RunConfig:
    """Return the settings that :func:`to_json` wrote.

    Raises:
        ConfigError: A setting is unknown, of another type, or out of its range.
    """
    try:
        return _ADAPTER.validate_python(document)
    except ValidationError as error:
        raise config_error(error) from error


def recorded_settings(path: Path | None) -> RunConfig | None:
    """Return the settings that an earlier call wrote, if there was one of this version."""
    if path is None or not exists(path):
        return None
    with suppress(ConfigError):  # what compares the settings says so
        return from_json(read_json(path))
    return None


def digest(config: RunConfig, but: Collection[str] = ()) -> str:
    """Return eight hexadecimal digits that name all settings that decide what is computed.

    Settings that came later are left out at their defaults: older runs keep their names.

    Args:
        config: The settings.
        but: Dotted names of settings that are left out.
    """
    document, defaults = _deciding(config), _deciding(RunConfig())
    for stage, names in LATER_FIELDS.items():
        for name in names:
            if document[stage][name] == defaults[stage][name]:
                del document[stage][name]
        if not document[stage]:
            del document[stage]
    for name in but:
        stage, _, field_name = name.partition(".")
        document.get(stage, {}).pop(field_name, None)
    return json_digest(document)[:8]


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Return every setting that decides what is computed and differs, with both values."""
    return named_differences(_deciding(one), _deciding(other))


def named_differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Return every value in which two nests of settings of one kind differ."""
    names: list[str] = []
    for name, value in one.items():
        if isinstance(value, dict) and isinstance(other[name], dict):
            names += named_differences(value, other[name], f"{prefix}{name}.")
        elif value != other[name]:
            write = size_text if name == "image_size" else str
            names.append(f"{prefix}{name} {write(value)} -> {write(other[name])}")
    return names


def _deciding(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide what is computed, their paths absolute."""
    document = to_json(with_absolute_paths(config))
    for name in ("max_corrupt", "cache_dir"):  # a run that they stopped resumes with others
        del document["data"][name]
    if config.data.source == BASE_SAMPLES:  # where they lie follows from the cache, too
        document["data"]["path"] = config.data.path and Path(config.data.path).name
    del document["prune"]["batch_size"]  # results depend on it by rounding alone
    model = document["model"]  # of a file the content decides, of architecture auto what it is for
    del model["config"]
    model["network"] = config.model.config and model["network"] and json_digest(model["network"])
    if config.sampler.scheduler is None:
        document["sampler"]["of_base"] = None  # nothing starts from it
    del document["compare"]  # comes after all else, and may be asked for later
    return document | {"compute": {name: document["compute"][name] for name in RESULT_FIELDS}}


def with_data(config: RunConfig, data: DataConfig) -> RunConfig:
    """Return settings with other images; what asks for a data set is left out where there is none.

    That are statistics of the data set to score against, and the base trained on.
    """
    if data.source != BASE_SAMPLES:
        return replace(config, data=data)
    evaluate = replace(config.evaluate, reference=None)
    return replace(config, data=data, evaluate=evaluate, compare=CompareConfig())


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make every path absolute: processes on a cluster have working directories of their own."""
    changes: dict[str, Any] = {}
    for name in PATHS:
        stage, _, field_name = name.partition(".")
        settings_of_stage = changes.get(stage, getattr(config, stage))
        value = getattr(settings_of_stage, field_name)
        if value is not None:
            is_base = name in ("model.base", "evaluate.features_model")
            is_hub = name == "data.path" and config.data.is_on_hub
            path = value if is_hub else _absolute_base(value) if is_base else _absolute(value)
            changes[stage] = replace(settings_of_stage, **{field_name: path})
    return replace(config, **changes)


def _absolute(path: str) -> str:
    resolved = resolve_path(path)
    return path if is_remote(resolved) else str(resolved.resolve())


def _absolute_base(base: str) -> str:
    kind, colon, path = base.partition(":")
    if kind in FILE_KINDS and colon:
        return f"{kind}:{_absolute(path)}"
    return _absolute(base) if resolve_path(base).exists() else base  # a name on the hub


def default_run_dir(config: RunConfig, but: Collection[str] = ()) -> Path:
    """Return the directory of a run that names none: one for the same settings.

    Args:
        config: The settings.
        but: Dotted names of settings that it does not depend on.
    """
    return Path("runs") / f"{config.preset}-seed{config.seed}-{digest(config, but)}"

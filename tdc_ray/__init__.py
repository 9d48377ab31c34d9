"""Progressive diffusion models: TDC Training (arXiv:2312.13307) as a distributed system on Ray.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdc_ray.cli.api.base import Base, load_base
    from tdc_ray.cli.api.experts import Experts, load_experts
    from tdc_ray.cli.api.make import finetune, prune
    from tdc_ray.cli.run import run
    from tdc_ray.config.presets import preset
    from tdc_ray.config.run import RunConfig
    from tdc_ray.data.images import Images
    from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
    from tdc_ray.diffusion.pipeline import ProgressivePipeline
    from tdc_ray.diffusion.plan import Plan
    from tdc_ray.diffusion.scheduler_plan import plan_groups
    from tdc_ray.runs.results import Results, load_results

__all__ = [
    "Base",
    "ExpertDenoiser",
    "Experts",
    "Images",
    "Plan",
    "ProgressivePipeline",
    "Results",
    "RunConfig",
    "finetune",
    "load_base",
    "load_experts",
    "load_results",
    "plan_groups",
    "preset",
    "prune",
    "run",
]

_MODULES = {
    "Base": "cli.api.base",
    "ExpertDenoiser": "diffusion.expert_denoiser",
    "Experts": "cli.api.experts",
    "Images": "data.images",
    "Plan": "diffusion.plan",
    "ProgressivePipeline": "diffusion.pipeline",
    "Results": "runs.results",
    "RunConfig": "config.run",
    "finetune": "cli.api.make",
    "load_base": "cli.api.base",
    "load_experts": "cli.api.experts",
    "load_results": "runs.results",
    "plan_groups": "diffusion.scheduler_plan",
    "preset": "config.presets",
    "prune": "cli.api.make",
    "run": "cli.run",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("tdc_ray.storage.provenance").versions()["tdc-ray"]
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

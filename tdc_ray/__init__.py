"""Progressive diffusion models: TDC Training (arXiv:2312.13307) as a distributed system on Ray.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdc_ray.cli.run import run
    from tdc_ray.config.presets import preset
    from tdc_ray.config.run import RunConfig
    from tdc_ray.diffusion.pipeline import ProgressivePipeline
    from tdc_ray.diffusion.plan import Plan, plan_groups
    from tdc_ray.runs.results import Results, load_results

__all__ = [
    "Plan",
    "ProgressivePipeline",
    "Results",
    "RunConfig",
    "load_results",
    "plan_groups",
    "preset",
    "run",
]

_MODULES = {
    "Plan": "diffusion.plan",
    "ProgressivePipeline": "diffusion.pipeline",
    "Results": "runs.results",
    "RunConfig": "config.run",
    "load_results": "runs.results",
    "plan_groups": "diffusion.plan",
    "preset": "config.presets",
    "run": "cli.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

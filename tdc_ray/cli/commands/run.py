"""Whole runs, and their plans."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from tdc_ray.config.run import RunConfig, default_run_dir, with_absolute_paths
from tdc_ray.diffusion.plan import Plan as GroupPlan
from tdc_ray.storage.logs import log_to
from tdc_ray.storage.object_store import located, shown

Settings = Annotated[RunConfig, arg(name="")]
"""Flags such as ``--plan.num-groups`` without a prefix of their own."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Do the whole of TDC Training: base, pruning rounds, fine-tunes, pipeline, scores.

    Run the same command again to go on after a cut, or to see the results of a finished run.
    With --finetune.num-steps 0 it is training-free: after the base no gradient step is taken, and
    the experts are what cut and least-squares refit make of the base, in minutes.
    """

    config: Settings
    run_dir: Path | None = None
    """Where everything goes: a path or a URI such as s3://bucket/run; default:
    runs/<preset>-seed<seed>-<digest of the settings>."""
    store: Path | None = None
    """Folder or URI in which runs share what they compute: what another run has left there of the
    same inputs is taken. A cache, which may be deleted."""
    dry_run: bool = False
    """Show the settings and the plan, check the data, and stop."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def execute(self, console: Console) -> None:
        """Run, or go on, and print what came out."""
        config = self.config
        folder = located(self.run_dir or default_run_dir(config))
        from tdc_ray.runs.pretrained.settings import with_first_stage  # imports torch
        from tdc_ray.runs.run import check, run  # imports ray

        if self.dry_run:
            console.print(config)
            _show_plan(config, console)
            check(with_first_stage(with_absolute_paths(config)))
            console.print(f"would run in {shown(folder)}", soft_wrap=True)
            return
        name = shown(folder)
        console.print(
            f"run directory {name}; the same command goes on after a cut", soft_wrap=True
        )
        from tdc_ray.reporting.console import print_results

        with log_to(folder / "run.log"):
            results = run(config, folder, console, self.store)
        print_results(console, results)
        console.print(
            f"results: {name}/results.json\nimages: tdc-ray sample {name}\n"
            f"curves: tensorboard --logdir {name}/tensorboard",
            soft_wrap=True,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show the groups of timesteps and what each may cost; trains nothing."""

    config: Settings
    out_dir: Path | None = None
    """Where plan.json and plan.png go; default: the default run directory."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def execute(self, console: Console) -> None:
        """Print the plan and write it."""
        from tdc_ray.diffusion.plan import to_json
        from tdc_ray.reporting.console import plot_plan
        from tdc_ray.storage.files import write_json

        config = self.config
        plan = _show_plan(config, console)
        folder = located(self.out_dir or default_run_dir(config))
        write_json(folder / "plan.json", to_json(plan))
        plot_plan(plan, folder / "plan.png")
        name = shown(folder)
        console.print(f"written: {name}/plan.json, {name}/plan.png", soft_wrap=True)


def _show_plan(config: RunConfig, console: Console) -> GroupPlan:
    from tdc_ray.diffusion.plan import plan_groups
    from tdc_ray.models.unet2d.architectures import base_unet
    from tdc_ray.models.unet2d.layers import count
    from tdc_ray.reporting.console import print_plan

    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    if config.model.base is None:
        unet = base_unet(config)
    else:
        from tdc_ray.runs.pretrained.settings import check_base
        from tdc_ray.runs.pretrained.sources import find_base  # imports torch

        unet = check_base(find_base(config.model.base), config)
    _, macs_base = count(unet)
    print_plan(console, plan, config, macs_base)
    return plan

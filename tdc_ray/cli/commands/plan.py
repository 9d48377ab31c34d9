"""``tdc-ray plan``."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tdc_ray.cli.commands.settings import Settings
from tdc_ray.cli.paths import check_config_file, check_output_folder
from tdc_ray.config.run import RunConfig, default_run_dir, with_absolute_paths
from tdc_ray.diffusion.plan import Plan
from tdc_ray.models.config_file import with_file
from tdc_ray.storage.object_store import display_path, resolve_path

if TYPE_CHECKING:
    from tdc_ray.runs.pretrained.sources import PretrainedBase


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Show the groups of timesteps and what each may cost; trains nothing."""

    config: Settings
    data: str | None = None
    """Images of your own: a folder of them (its subfolders are classes), an npz file, a Hugging
    Face image folder, parquet or WebDataset shards. Size, channels and classes are found out, and
    so are model and steps; a flag overrides each, --preset or --base all but where images are.
    base, with --base: no images are needed, they are drawn from it (--data.num-images)."""
    out_dir: Path | None = None
    """Where plan.json and plan.png go; default: the default run directory."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_output_folder("--out-dir", self.out_dir or "runs")
        check_config_file(self.config.model)

    def execute(self, console: Console) -> None:
        """Print the plan and write it."""
        from tdc_ray.diffusion.plan import to_json
        from tdc_ray.reporting.figures import plot_plan
        from tdc_ray.storage.files import write_json

        config = self.config
        if self.data is not None:
            from tdc_ray.data.survey import log_summary

            log_summary(with_absolute_paths(config).data)
        # What a run of a config file is called follows from its content.
        named = replace(config, model=with_file(config.model))
        folder = resolve_path(self.out_dir or default_run_dir(named))
        base = None
        if config.model.is_open:
            from tdc_ray.runs.choices import with_choices  # imports torch

            config = with_choices(with_absolute_paths(config))
        if config.model.base is not None:
            from tdc_ray.runs.choices import with_pretrained  # imports torch

            config, base = with_pretrained(config)
        plan = show_plan(config, base, console)
        write_json(folder / "plan.json", to_json(plan))
        plot_plan(plan, folder / "plan.png")
        name = display_path(folder)
        console.print(f"written: {name}/plan.json, {name}/plan.png", soft_wrap=True)


def show_plan(config: RunConfig, base: "PretrainedBase | None", console: Console) -> Plan:
    """Print the settings that a plan follows from, and the plan; return the plan."""
    from tdc_ray.diffusion.plan import plan_groups
    from tdc_ray.models.structure import network_structure
    from tdc_ray.models.training_memory import training_memory
    from tdc_ray.models.unet2d.architectures import base_unet
    from tdc_ray.reporting.console import print_plan, print_training_memory

    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    if base is None:
        unet, notes = base_unet(config.model, config.conditioning), []
    else:
        from tdc_ray.runs.pretrained.importer import check_compatible  # imports torch
        from tdc_ray.runs.pretrained.notes import base_notes

        unet = check_compatible(base, config)
        notes = base_notes(base, config.diffusion, config.sampler)
    structure = network_structure(unet)
    print_plan(console, plan, config.preset, config.plan, config.prune.objective, structure.macs)
    if base is None:
        number, sharding = config.compute.num_base_workers, config.compute.sharding
        memory = training_memory(structure, number, sharding, config.base.precision)
        print_training_memory(console, memory, number)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    return plan

"""``tdc-ray run``."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from rich.console import Console

from tdc_ray.cli.commands.plan import show_plan
from tdc_ray.cli.commands.settings import LogTo, Settings
from tdc_ray.cli.output import PlainConsole
from tdc_ray.cli.paths import (
    check_config_file,
    check_folder,
    check_output_folder,
    check_settings,
)
from tdc_ray.config.presets import preset
from tdc_ray.config.run import (
    RunConfig,
    default_run_dir,
    named_differences,
    to_json,
    with_absolute_paths,
)
from tdc_ray.errors import TdcError
from tdc_ray.models.config_file import with_file
from tdc_ray.reporting.loggers.names import check_loggers
from tdc_ray.storage.files import exists
from tdc_ray.storage.logs import log_to
from tdc_ray.storage.object_store import display_path, is_remote, resolve_path
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """Run all of TDC Training: base, pruning rounds, fine-tunes, pipeline, scores.

    Run the same command again to resume after an interruption, or to see the results of a finished
    run. With --finetune.num-steps 0 it is training-free: after the base no gradient step is taken,
    and the experts are the base pruned and refitted by least squares, in minutes.
    """

    config: Settings
    data: str | None = None
    """Images of your own: a folder of them (its subfolders are classes), an npz file, a Hugging
    Face image folder, parquet or WebDataset shards. Size, channels and classes are found out, and
    so are model and steps; a flag overrides each, --preset or --base all but where images are.
    base, with --base: no images are needed, they are drawn from it (--data.num-images)."""
    run_dir: Path | None = None
    """Where everything goes: a path or a URI such as s3://bucket/run; default:
    runs/<preset>-seed<seed>-<digest of the settings>."""
    store: Path | None = None
    """Folder or URI of a cache that runs share: what another run computed from the same inputs is
    reused. It may be deleted."""
    log_to: LogTo = ()
    dry_run: bool = False
    """Show the settings and the plan, check the data, and stop."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        folder = self._folder()
        check = check_folder if self.dry_run else check_output_folder
        check("--run-dir", folder or "runs")
        if self.store is not None:
            check("--store", self.store)
        if not _is_finished(folder):  # finished work needs none
            check_settings(self.config)
        if not self._has_begun:  # what a run has read of the file is in its settings
            check_config_file(self.config.model)

    def _folder(self) -> Path | None:
        """Return the run directory, if the settings tell which it is."""
        if self.run_dir is not None or not isinstance(self.config, RunConfig):  # unchecked
            return self.run_dir
        with suppress(TdcError):  # a missing model.config is refused as a path
            return default_run_dir(replace(self.config, model=with_file(self.config.model)))
        return None

    def execute(self, console: Console) -> None:
        """Start or resume the run, and print its results."""
        config, trackers = self.config, sum(self.log_to, ())
        check_loggers(trackers)
        if not self._has_begun:  # what a run of a config file is called follows from its content
            config = replace(config, model=with_file(config.model))
        folder = resolve_path(self.run_dir or default_run_dir(config))
        name = display_path(folder)
        from tdc_ray.cli.run import run
        from tdc_ray.execution.ray.cluster import check_local_ray
        from tdc_ray.models.unet2d.architectures import base_unet
        from tdc_ray.runs.budget import steps_by_count
        from tdc_ray.runs.choices import with_choices, with_pretrained
        from tdc_ray.runs.preflight import check
        from tdc_ray.runs.pretrained.importer import with_first_stage
        from tdc_ray.runs.stages.base_samples import with_base_samples

        if self.dry_run:
            recorded = RunDir(folder).config
            config, base = with_pretrained(with_absolute_paths(config), recorded)
            config = with_base_samples(with_first_stage(config, base), base)
            config = with_choices(config, recorded)
            _, space, plan = check(config, base)
            if not exists(recorded):
                config = steps_by_count(config, plan, space.macs_base)
            check_local_ray()
            console.print(config if self.verbose else settings_text(config), soft_wrap=True)
            show_plan(config, base, console)
            if config.budget.hours is not None:
                console.print("--hours: the steps are set once they have been timed")
            console.print(f"would run in {name}", soft_wrap=True)
            return
        if config.model.base is None and not config.model.is_open:
            base_unet(config.model, config.conditioning)  # refuses an unknown architecture
        console.print(
            f"run directory {name}; interrupted, the same command resumes it", soft_wrap=True
        )
        from tdc_ray.reporting.console import print_results

        with log_to(folder / "run.log"):
            began = console.began if isinstance(console, PlainConsole) else None
            results = run(config, folder, console, self.store, trackers, began)
        print_results(console, results)
        console.print(
            f"results: {name}/results.json\n"
            f"images: {name}/samples-base.png, {name}/samples-tdc.png, more by tdc-ray sample "
            f"{quote(name)}\n"
            f"curves: tensorboard --logdir {quote(f'{name}/tensorboard')}",
            soft_wrap=True,
        )

    @property
    def _has_begun(self) -> bool:
        """Whether the run directory, where one is named, has settings of an earlier call."""
        return self.run_dir is not None and exists(RunDir(resolve_path(self.run_dir)).config)


def settings_text(config: RunConfig) -> str:
    """Write which settings of a run are not its preset's; of a network the log says more."""
    document = to_json(config)
    usual = to_json(with_absolute_paths(preset(config.preset)))
    for one in (document, usual):
        del one["model"]["network"]
    changed = named_differences(usual, document)
    title = f"settings: the preset {config.preset}{', but' if changed else ''} (--verbose: all)"
    return "\n".join([title, *(f"  {one}" for one in changed)])


def _is_finished(folder: Path | None) -> bool:
    """Whether the results of a run are here."""
    if folder is None or is_remote(path := resolve_path(folder)):
        return False
    return RunDir(path).results.exists()

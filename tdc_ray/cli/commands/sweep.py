"""``tdc-ray sweep``."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from tdc_ray.cli.commands.settings import LogTo, Settings
from tdc_ray.cli.paths import check_config_file, check_output_folder, check_settings
from tdc_ray.config.run import RunConfig, with_absolute_paths
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.errors import ConfigError, WorkFailedError
from tdc_ray.reporting.loggers.names import check_loggers
from tdc_ray.runs.sweep.space import check_space, parse_space
from tdc_ray.storage.object_store import display_path, resolve_path


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """Search settings by Ray Tune and Optuna: every trial is a whole run.

    What trials have in common, such as the base, is computed once. Run the same command again to
    resume after an interruption: finished trials are not run again.

    tdc-ray sweep --vary k=0.3,0.5,0.7 N=2,4 --seeds 0 1

    tdc-ray sweep --name rates --search tpe --vary finetune.learning_rate=1e-4..1e-2:log
    """

    config: Settings
    data: str | None = None
    """Images of your own, as of tdc-ray run --data."""
    vary: tuple[str, ...]
    """What is varied: FIELD=VALUE,VALUE,... or FIELD=LOW..HIGH, with :log behind it for even steps
    of the logarithm. Any setting is a field by its dotted name, such as plan.min_macs_share; k, N,
    schedule and proxy are short for the plan's and the pruning method."""
    sweep: Annotated[SweepConfig, arg(name="")] = field(default_factory=SweepConfig)
    name: str = "sweep"
    """Name of the sweep, and of its folder."""
    storage: Path = Path("runs")
    """Folder or URI that the sweep's folder lies in."""
    log_to: LogTo = ()
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_output_folder("--storage and --name", resolve_path(self.storage) / self.name)
        check_settings(self.config)
        check_config_file(self.config.model)

    def execute(self, console: Console) -> None:
        """Start or resume the sweep, and print its results."""
        if self.config.seed != RunConfig().seed:
            raise ConfigError("a sweep does not use seed: set its training seeds by --seeds.")
        trackers = sum(self.log_to, ())
        check_loggers(trackers)
        space = parse_space(self.vary, self.config)
        check_space(space, self.config, self.sweep)
        folder = resolve_path(self.storage) / self.name
        console.print(
            f"sweep {display_path(folder)}; interrupted, the same command resumes it\n"
            f"curves and HParams: tensorboard --logdir {quote(display_path(folder))}",
            soft_wrap=True,
        )
        if self.data is not None:
            from tdc_ray.data.survey import log_summary

            log_summary(with_absolute_paths(self.config).data)
        from tdc_ray.reporting.console import print_sweep
        from tdc_ray.reporting.hparams import HParams
        from tdc_ray.reporting.progress import SweepLine
        from tdc_ray.reporting.sinks import trial_sinks
        from tdc_ray.runs.sweep.results import load_sweep
        from tdc_ray.runs.sweep.sweep import sweep  # imports ray

        try:
            results = sweep(
                self.config,
                space,
                self.sweep,
                folder,
                sinks=[HParams(folder), SweepLine(console)],
                sinks_for=partial(trial_sinks, log_to=trackers),
            )
        except WorkFailedError:
            print_sweep(console, load_sweep(folder))
            raise
        print_sweep(console, results)

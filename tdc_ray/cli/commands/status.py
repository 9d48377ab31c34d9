"""``tdc-ray status``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.paths import check_input
from tdc_ray.storage.object_store import resolve_path


@dataclass(frozen=True, kw_only=True)
class StatusCommand:
    """Show the progress of a run (groups, running items, workers) from its directory alone."""

    run: Positional[Path]
    """The run directory."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_input(self.run, "a run directory")

    def execute(self, console: Console) -> None:
        """Print the progress of the run."""
        from tdc_ray.reporting.workers import print_start, print_status
        from tdc_ray.runs.status import start_status, status
        from tdc_ray.storage.run_dir import RunDir

        run_dir = RunDir(resolve_path(self.run))
        start = start_status(run_dir)
        if start is not None:
            print_start(console, start)
        else:
            print_status(console, status(run_dir))

"""``tdc-ray ls``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.paths import check_input
from tdc_ray.errors import StorageError
from tdc_ray.storage.object_store import display_path, resolve_path


@dataclass(frozen=True, kw_only=True)
class LsCommand:
    """List the runs in a folder and below it, trials of sweeps included, finished or not."""

    folder: Positional[Path] = Path("runs")
    """Where to look, or a URI."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_input(self.folder, "a folder of runs")

    def execute(self, console: Console) -> None:
        """Print a line for each run."""
        from tdc_ray.reporting.overview import print_runs
        from tdc_ray.runs.overview import find_runs, load_overviews

        roots = find_runs(resolve_path(self.folder))
        if not roots:
            raise StorageError(
                f"{display_path(self.folder)} holds no run: name a folder that tdc-ray run or "
                "tdc-ray sweep wrote into."
            )
        print_runs(console, load_overviews(roots))

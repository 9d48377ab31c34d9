"""``tdc-ray compare``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.paths import check_input
from tdc_ray.config.validation import refuse
from tdc_ray.storage.object_store import resolve_path


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Put runs side by side: the settings that differ, scores and costs."""

    runs: Positional[tuple[Path, ...]]
    """Run directories, or their URIs; two or more, each shown once."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or fewer than two."""
        for run in dict.fromkeys(self.runs):
            check_input(run, "a run directory")
        if len(self._distinct()) < 2:
            named = ", ".join(map(str, self.runs)) or "none"
            refuse(f"tdc-ray compare needs at least two different run directories, got {named}.")

    def execute(self, console: Console) -> None:
        """Print the tables."""
        from tdc_ray.reporting.overview import print_comparison
        from tdc_ray.runs.overview import load_overview

        print_comparison(console, [load_overview(run) for run in self._distinct()])

    def _distinct(self) -> list[Path]:
        return list(dict.fromkeys(resolve_path(run).resolve() for run in self.runs))

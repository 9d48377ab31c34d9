"""``tdc-ray report``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.paths import check_input, check_output_folder
from tdc_ray.errors import ConfigError
from tdc_ray.storage.object_store import display_path


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write a report on runs and sweeps: a page for a browser; its tables as Markdown and CSV too.

    The page needs no network and runs no script. Runs that are not finished are shown as far as
    they are.
    """

    runs: Positional[tuple[Path, ...]]
    """Run directories and folders of sweeps, or their URIs."""
    out: Path | None = None
    """Where index.html, report.md and tables/ go; default: RUN/report, and for several report."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        for run in self.runs:
            check_input(run, "a run directory, or the folder of a sweep")
        if self.out is not None:
            check_output_folder("--out", self.out)

    def execute(self, console: Console) -> None:
        """Write the report, and print where it is."""
        if not self.runs:
            raise ConfigError("tdc-ray report needs at least one run directory or sweep.")
        from tdc_ray.reporting.html.write import write_report

        page = write_report(self.runs, self.out)
        console.print(f"written: {display_path(page)} (and report.md, tables/)", soft_wrap=True)

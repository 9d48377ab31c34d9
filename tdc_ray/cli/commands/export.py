"""``tdc-ray export``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.paths import check_input, check_output_folder
from tdc_ray.storage.object_store import display_path


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Export a finished run's experts for diffusers, plain PyTorch and tdc_ray.

    With a model card, and code that needs neither Ray nor tdc_ray.
    """

    run: Positional[Path]
    """The run directory, or its URI."""
    out: Positional[Path]
    """A new folder."""
    denoiser: bool = False
    """Export them as one network for any pipeline of diffusers (tdc_ray.ExpertDenoiser), what
    they have in common once, in place of a pipeline of their own with its code."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_input(self.run, "a finished run directory")
        check_output_folder("OUT", self.out)

    def execute(self, console: Console) -> None:
        """Export the run, and print where to."""
        from tdc_ray.runs.export.export import export_run

        export_run(self.run, self.out, denoiser=self.denoiser)
        console.print(
            f"written: {display_path(self.out)} (README.md says how to sample)", soft_wrap=True
        )

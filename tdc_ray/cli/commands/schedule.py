"""``tdc-ray schedule``."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.paths import check_input, check_output_folder
from tdc_ray.config.validation import errors_together, require
from tdc_ray.storage.object_store import display_path


@dataclass(frozen=True, kw_only=True)
class ScheduleCommand:
    """Choose which network of a finished run takes which sampling step, within a budget of macs.

    Between base, experts and sub-models that are pruned in between, by each one's loss at each
    step on held-out images and noise.
    """

    run: Positional[Path]
    """A finished run directory, or its URI."""
    macs: float
    """Most macs of a sampling step, on average over the steps, as a share of the base's, in
    (0, 1]."""
    out: Path | None = None
    """Where the pipeline and schedule.json go; default: RUN/schedules/MACS."""
    widths: tuple[float, ...] | None = None
    """Macs, as shares of the base's, of further sub-models that each group's base is pruned to,
    without a fine-tune; default: 0.75 of --macs where the experts take more than --macs."""
    networks: tuple[Path, ...] = ()
    """Folders of further networks, as tdc-ray prune writes them, which may run at any step."""
    num_images: int = 256
    """Noised images at each step by which networks are compared; as many judge the choice."""
    num_inference_steps: int | None = None
    """Sampling steps; default: as many as the run's."""
    score: bool = False
    """Score the pipeline as the run's own models, from the same noise."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_input(self.run, "a finished run directory")
        for network in self.networks:
            check_input(network, "what tdc-ray prune wrote, by --networks")
        check_output_folder("--out", self._folder)

    @property
    def _folder(self) -> Path:
        return self.out or self.run / "schedules" / f"{self.macs:g}"

    def execute(self, console: Console) -> None:
        """Choose, write the pipeline, and print what takes which steps.

        Raises:
            ConfigError: An argument is out of its range.
        """
        with errors_together():
            require("schedule", self, "macs", "in (0, 1]", ok=0 < self.macs <= 1)
            shares = all(0 < width < 1 for width in self.widths or ())
            require("schedule", self, "widths", "in (0, 1)", ok=shares)
            require("schedule", self, "num_images", "at least 2", ok=self.num_images >= 2)
            steps = self.num_inference_steps
            rule = "at least 1"
            require("schedule", self, "num_inference_steps", rule, ok=steps is None or steps >= 1)
        out = self._folder
        from tdc_ray.reporting.sinks import default_sinks
        from tdc_ray.reporting.step_schedule import print_step_schedule
        from tdc_ray.runs.step_schedule.networks import ScheduleSpec
        from tdc_ray.runs.step_schedule.schedule import REPORT_FILE, schedule_run

        spec = ScheduleSpec(
            macs_share=self.macs,
            widths=self.widths,
            networks=self.networks,
            num_images=self.num_images,
            num_inference_steps=self.num_inference_steps,
        )
        sinks_for = partial(default_sinks, console=console)
        result = schedule_run(self.run, out, spec, with_score=self.score, sinks_for=sinks_for)
        print_step_schedule(console, result)
        console.print(
            f"written: {display_path(out)}/{REPORT_FILE} and the pipeline, which tdc-ray sample "
            f"{quote(display_path(out))} samples with",
            soft_wrap=True,
        )

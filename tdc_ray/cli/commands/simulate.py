"""``tdc-ray simulate``."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from tdc_ray.cli.commands.settings import Settings
from tdc_ray.cli.paths import check_input, check_output_file
from tdc_ray.config.run import to_json
from tdc_ray.config.simulation import SimulationConfig


@dataclass(frozen=True, kw_only=True)
class SimulateCommand:
    """Estimate how long stage 2 would take on a cluster that you do not have; starts nothing.

    It runs the scheduler of a run in simulated time. Times of items were measured (--costs RUN) or
    follow from their macs and --macs-per-second.
    """

    config: Settings
    simulation: Annotated[SimulationConfig, arg(name="")] = field(default_factory=SimulationConfig)
    json: Path | None = None
    """Where the table goes as JSON."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        if self.simulation.costs is not None:
            check_input(self.simulation.costs, "a run directory, by --costs")
        if self.json is not None:
            check_output_file("--json", self.json)

    def execute(self, console: Console) -> None:
        """Print, and write, the simulated times."""
        from tdc_ray.reporting.workers import print_simulated
        from tdc_ray.runs.simulation import assumptions, simulate_run
        from tdc_ray.storage.files import write_json

        results, notes = simulate_run(self.config, self.simulation), assumptions(self.config)
        print_simulated(console, results, self.simulation.macs_per_second, notes)
        if self.json is not None:
            simulated = [asdict(result) for result in results]
            document = {"settings": to_json(self.config), "simulated": simulated, "notes": notes}
            write_json(self.json, document)

"""What looks at runs, or ahead of them, and changes nothing."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from tdc_ray.cli.commands.run import Settings
from tdc_ray.config.run import to_json
from tdc_ray.config.simulation import SimulationConfig
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.storage.object_store import located, shown


@dataclass(frozen=True, kw_only=True)
class Status:
    """Show how far a run is: groups, what is under way, workers; from wherever it can be seen."""

    run: Positional[Path]
    """The run directory."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def execute(self, console: Console) -> None:
        """Print how far it is."""
        from tdc_ray.reporting.workers import print_status
        from tdc_ray.runs.status import status
        from tdc_ray.storage.run_dir import RunDir

        print_status(console, status(RunDir(located(self.run))))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Show the memory bank: every pruning scheme that was cut, and its losses, best last."""

    run: Positional[Path]
    """A run directory, or what tdc-ray prune wrote, or its URI."""
    group: int | None = None
    """Only this group."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def execute(self, console: Console) -> None:
        """Print the entries."""
        from tdc_ray.pruning.memory import MemoryBank
        from tdc_ray.reporting.console import print_memory
        from tdc_ray.storage.files import exists, listing
        from tdc_ray.storage.run_dir import RunDir

        folder = located(self.run)
        paths = [RunDir(folder).memory, *listing(folder, "search/*/memory.jsonl")]
        found = [path for path in paths if exists(path)]
        if not found:
            raise StorageError(
                f"{shown(folder)} holds no memory bank: {shown(paths[0])} does not exist."
            )
        banks = {path: MemoryBank(path).all() for path in found}
        groups = sorted({entry.group for entries in banks.values() for entry in entries})
        if self.group is not None and self.group not in groups:
            names = ", ".join(map(str, groups)) or "none yet"
            raise ConfigError(f"--group must be in the memory bank ({names}), got {self.group}.")
        for path, entries in banks.items():
            print_memory(console, [e for e in entries if self.group in (None, e.group)], path)


@dataclass(frozen=True, kw_only=True)
class Report:
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

    def execute(self, console: Console) -> None:
        """Write it, and say where."""
        from tdc_ray.reporting.html.write import write_report

        if not self.runs:
            raise ConfigError("tdc-ray report needs at least one run directory or sweep.")
        page = write_report(self.runs, self.out)
        console.print(f"written: {shown(page)} (and report.md, tables/)", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Say how long stage 2 would take on a cluster that you do not have; starts nothing.

    The very scheduling policy of a run, in simulated time. What items take is measured
    (--costs RUN) or follows from their macs and --macs-per-second.
    """

    config: Settings
    simulation: Annotated[SimulationConfig, arg(name="")] = field(default_factory=SimulationConfig)
    json: Path | None = None
    """Where the table goes as JSON."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def execute(self, console: Console) -> None:
        """Print, and write, what would come out."""
        from tdc_ray.reporting.workers import print_simulated
        from tdc_ray.runs.simulation import simulate_run
        from tdc_ray.storage.files import write_json

        found = simulate_run(self.config, self.simulation)
        print_simulated(console, found, self.simulation.macs_per_second)
        if self.json is not None:
            document = [asdict(one) for one in found]
            write_json(self.json, {"settings": to_json(self.config), "simulated": document})

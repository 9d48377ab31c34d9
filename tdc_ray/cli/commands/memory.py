"""``tdc-ray memory``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from tdc_ray.cli.paths import check_input
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.storage.object_store import display_path, resolve_path


@dataclass(frozen=True, kw_only=True)
class MemoryCommand:
    """Show the memory bank: every pruning scheme that was measured, and its losses, best last.

    After a refit schemes rank by how far their prediction is from the base's (distance); losses
    on fewer images, of schemes that left the race early, compare with no others.
    """

    run: Positional[Path]
    """A run directory, or what tdc-ray prune wrote, or its URI."""
    group: int | None = None
    """Only this group."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there, or cannot be written to."""
        check_input(self.run, "a run directory, or what tdc-ray prune wrote")

    def execute(self, console: Console) -> None:
        """Print the entries."""
        from tdc_ray.pruning.memory import MemoryBank
        from tdc_ray.reporting.console import print_memory
        from tdc_ray.storage.files import exists, listing
        from tdc_ray.storage.run_dir import RunDir

        folder = resolve_path(self.run)
        paths = [RunDir(folder).memory, *listing(folder, "search/*/memory.jsonl")]
        banks = [path for path in paths if exists(path)]
        if not banks:
            raise StorageError(
                f"{display_path(folder)} holds no memory bank: {display_path(paths[0])} does not "
                "exist."
            )
        entries_of = {path: MemoryBank(path).all() for path in banks}
        groups = sorted({entry.group for entries in entries_of.values() for entry in entries})
        if self.group is not None and self.group not in groups:
            names = ", ".join(map(str, groups)) or "none yet"
            raise ConfigError(f"--group must be in the memory bank ({names}), got {self.group}.")
        for path, entries in entries_of.items():
            print_memory(console, [e for e in entries if self.group in (None, e.group)], path)

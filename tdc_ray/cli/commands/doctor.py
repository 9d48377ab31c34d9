"""``tdc-ray doctor``."""

from dataclasses import dataclass

from rich.console import Console

from tdc_ray.errors import ClusterError


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Check this machine, every node of a cluster and the storage; say what to do about problems.

    It exits with 1 if something is wrong.
    """

    address: str | None = None
    """The Ray cluster's address, or auto for the one that runs here; default: RAY_ADDRESS, else a
    Ray that is started on this machine."""
    storage: str | None = None
    """Path or URI where runs are to be written: every node writes, reads, lists, creates, replaces
    and removes files there."""
    paths: tuple[str, ...] = ()
    """Paths that every node must have, such as data and caches."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse no path: what is wrong with one is said with all else that is."""

    def execute(self, console: Console) -> None:
        """Print what was found as it is found."""
        from tdc_ray.runs.doctor import diagnose

        num_problems = 0
        for check in diagnose(self.address, self.storage, self.paths):
            sign = "ok     " if check.remedy is None else "PROBLEM"
            console.print(f"{sign} {check.where}: {check.what}", soft_wrap=True, highlight=False)
            if check.remedy is not None:
                num_problems += 1
                console.print(f"        -> {check.remedy}", soft_wrap=True, highlight=False)
        if num_problems:
            raise ClusterError(f"{num_problems} of these should be put right before a run.")
        console.print("nothing is wrong")

"""A whole run with all that shows it: what ``tdc_ray.run`` is."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tdc_ray.config.run import RunConfig
from tdc_ray.reporting.loggers.names import LoggerName, check_loggers
from tdc_ray.reporting.sinks import default_sinks
from tdc_ray.runs import run as run_module
from tdc_ray.runs.results import Results
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.run_dir import RunDir


def run(
    config: RunConfig,
    folder: Path,
    console: Console,
    store: Path | None = None,
    log_to: Sequence[LoggerName] = (),
    began: float | None = None,
) -> Results:
    """Start or resume a whole run, as ``runs.run`` does, with the default sinks.

    Args:
        config: The settings.
        folder: The run directory, or its URI.
        console: Where progress is shown.
        store: The cache that runs share, a folder or a URI; None means that all is computed here.
        log_to: Trackers that the run is logged to beside TensorBoard.
        began: When ``--hours`` began, by ``time.perf_counter``; None means now.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
    """
    check_loggers(log_to)
    sinks = default_sinks(RunDir(resolve_path(folder).resolve()), console, log_to)
    return run_module.run(config, folder, sinks, store, began)

"""The command line: parses, configures logging, executes, and turns errors into exit codes."""

import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.logging import RichHandler

from tdc_ray.cli.commands.prune import Prune
from tdc_ray.cli.commands.run import Run
from tdc_ray.cli.commands.sweep import Sweep
from tdc_ray.cli.commands.train_autoencoder import TrainAutoencoder
from tdc_ray.cli.parse import parse
from tdc_ray.errors import TdcError

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; give the exit code: 0, 1 for an error, 130 for an interrupt."""
    console = Console()
    try:
        command = parse(arguments)
    except TdcError as error:
        return _fail(error, verbose="--verbose" in arguments)
    _configure_logging(console, verbose=command.verbose)
    try:
        command.execute(console)
    except (TdcError, OSError) as error:  # a full disk, a folder that cannot be written
        return _fail(error, verbose=command.verbose)
    except KeyboardInterrupt:
        resumable = isinstance(command, Run | Sweep | Prune | TrainAutoencoder)
        again = "; run the same command again to go on" if resumable else ""
        Console(stderr=True).print(f"interrupted{again}", soft_wrap=True)
        return 130
    return 0


def _configure_logging(console: Console, *, verbose: bool) -> None:
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tdc_ray").setLevel(logging.DEBUG if verbose else logging.INFO)


def _fail(error: TdcError | OSError, *, verbose: bool) -> int:
    if verbose:
        logger.error("", exc_info=error)
    Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
    return 1

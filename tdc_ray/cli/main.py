"""Runs a command line: parses it, configures logging, turns errors into exit codes."""

import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.logging import RichHandler

from tdc_ray.cli.commands.prune import PruneCommand
from tdc_ray.cli.commands.run import RunCommand
from tdc_ray.cli.commands.sweep import SweepCommand
from tdc_ray.cli.commands.train_autoencoder import TrainAutoencoderCommand
from tdc_ray.cli.parse import parse
from tdc_ray.errors import TdcError

RESUMABLE = (RunCommand, SweepCommand, PruneCommand, TrainAutoencoderCommand)

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the command line and exit."""
    try:
        code = run_command(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; return the exit code: 0, 1 for an error, 130 for an interrupt."""
    console = Console(markup=False)  # names and paths may hold brackets
    try:
        command = parse(arguments)
    except TdcError as error:
        return _fail(error, verbose="--verbose" in arguments)
    _configure_logging(console, verbose=command.verbose)
    try:
        command.execute(console)
    except BrokenPipeError:
        raise
    except (TdcError, OSError) as error:  # a full disk, a folder that cannot be written
        return _fail(error, verbose=command.verbose)
    except KeyboardInterrupt:
        again = "; run the same command again to resume" if isinstance(command, RESUMABLE) else ""
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

"""Where a command line prints: text as it is, and no traceback where nobody reads it."""

import logging
import sys
import time
from typing import NoReturn

from rich.console import Console
from rich.logging import RichHandler


class PlainConsole(Console):
    """A console that prints names and paths as they are, whatever brackets or colons they hold."""

    def __init__(self, *, stderr: bool = False) -> None:
        """Create it for the standard output, or the standard error."""
        super().__init__(stderr=stderr, markup=False, emoji=False)
        self.began = time.perf_counter()
        """When the command line began that prints here."""

    def on_broken_pipe(self) -> NoReturn:
        """Let ``main`` end the command, where rich would exit with 1."""
        raise BrokenPipeError


class _LogLines(logging.StreamHandler):  # type: ignore[type-arg]
    """Lines of a log, which are lost where what reads them has enough."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)


def configure_logging(console: Console, *, verbose: bool) -> None:
    """Show the log of this package, and warnings of others."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = _LogLines(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tdc_ray").setLevel(logging.DEBUG if verbose else logging.INFO)

"""Runs a command line: parses it, configures logging, turns errors into exit codes.

All else is imported inside the functions, so that Ctrl-C meets ``main`` from the start on.
"""

import os
import signal
import sys
from collections.abc import Sequence

BROKEN_PIPE = 141
"""Exit code of a command whose output is no longer read, as of one that SIGPIPE ends."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

RESUMABLE = ("run", "sweep", "prune", "train-autoencoder")
"""Commands that resume."""


def main() -> None:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_at_once)  # until all is imported that a better way takes
    from tdc_ray.execution.interrupts import handle_interrupts, ignore_interrupts, received_signal

    handle_interrupts(_say_interrupted)
    code, is_output_lost = 1, False
    try:
        if sys.stdout is None or sys.stderr is None:  # closed by >&-
            _replace_closed_streams()
        code = _exit_code(sys.argv[1:])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BrokenPipeError:  # what reads the output, such as head, has enough
        code, is_output_lost = BROKEN_PIPE, True
    except OSError as error:  # the output's disk is full
        code, is_output_lost = _fail(error, verbose=False), True
    except KeyboardInterrupt:
        code = INTERRUPTED
        if received_signal() is None:
            os.write(2, b"interrupted\n")
    finally:
        ignore_interrupts()
        if (number := received_signal()) is not None:
            # Whatever it was turned into on its way; and libraries that it cut crash as they end.
            os._exit(128 + number)
    if is_output_lost:
        for stream in (sys.stdout, sys.stderr):  # else Python, at its end, fails to write the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _end_at_once(number: int, frame: object) -> None:
    """End as Ctrl-C ends a command that has done nothing yet."""
    del number, frame
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _say_interrupted(number: int) -> None:
    """Print in a line, in a signal's handler, what is kept and how to resume."""
    word = "interrupted" if number == signal.SIGINT else "terminated"
    os.write(2, f"{word}{_how_to_resume(sys.argv[1:])}\n".encode())


def _how_to_resume(arguments: Sequence[str]) -> str:
    if not set(arguments[:1]) & set(RESUMABLE) or "--dry-run" in arguments:
        return ""
    return ": what is finished is kept; run the same command again to resume"


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; return the exit code: 0, 1 for an error, 130 for an interrupt."""
    from tdc_ray.cli.output import PlainConsole, configure_logging
    from tdc_ray.cli.parse import help_text, parse
    from tdc_ray.errors import TdcError
    from tdc_ray.execution.interrupts import received_signal
    from tdc_ray.storage.provenance import versions

    console = PlainConsole()
    if list(arguments) == ["--version"]:
        console.print(f"tdc-ray {versions()['tdc-ray']}", highlight=False)
        return 0
    try:
        if (text := help_text(arguments)) is not None:
            console.print(text, highlight=False, soft_wrap=True)
            return 0
        configure_logging(console, verbose="--verbose" in arguments)
        command = parse(arguments)
    except TdcError as error:
        return _fail(error, verbose="--verbose" in arguments)
    try:
        command.execute(console)
    except BrokenPipeError:
        raise
    except (TdcError, OSError) as error:  # a full disk, a folder that cannot be written
        return _fail(error, verbose=command.verbose)
    except KeyboardInterrupt:
        if received_signal() is None:
            text = f"interrupted{_how_to_resume(arguments)}"
            PlainConsole(stderr=True).print(text, soft_wrap=True)
        return INTERRUPTED
    return 0


def _exit_code(arguments: Sequence[str]) -> int:
    try:
        return run_command(arguments)
    except SystemExit as end:  # tyro's, after --help or a flag that there is not
        return end.code if isinstance(end.code, int) else 1


def _replace_closed_streams() -> None:
    """Let what is printed go nowhere."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115  # until the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115


def _fail(error: Exception, *, verbose: bool) -> int:
    import logging

    from tdc_ray.cli.output import PlainConsole
    from tdc_ray.execution.interrupts import received_signal

    if received_signal() is not None:  # that is why
        return INTERRUPTED
    if verbose:
        logging.getLogger(__name__).error("", exc_info=error)
    PlainConsole(stderr=True).print(f"error: {error}", soft_wrap=True, highlight=False)
    return 1

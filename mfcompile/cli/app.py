"""Running one command: what it was asked, how it ended. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from mfcompile.cli import bench, compare, export, inspect, prune, unpack, verify
from mfcompile.cli.console import Terminal
from mfcompile.cli.parser import build_parser
from mfcompile.errors import MfcompileError, ParityError
from mfcompile.recipe import ReproductionError

COMMANDS = {
    "prune": prune.add_parser,
    "compare": compare.add_parser,
    "inspect": inspect.add_parser,
    "export": export.add_parser,
    "unpack": unpack.add_parser,
    "verify": verify.add_parser,
    "bench": bench.add_parser,
}

DONE, CHECK_FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after ``mfcompile``; those of the process when None.

    Returns:
        The exit status: 0 done, 1 a check failed or something unexpected happened, 2 a mistake in what was asked,
        or an interrupted run.
    """
    parser = build_parser(COMMANDS)
    args, words = parser.parse_known_args(argv)
    if words:
        parser.refuse(words, args.command)
    if args.command is None:
        parser.print_help(sys.stderr)
        return MISTAKE
    terminal = Terminal()
    try:
        with _terminated_as_interrupted(), _quiet(args.debug):
            status: int = args.run(args, terminal)
            return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of a pipe left: say nothing more
        return CHECK_FAILED
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            terminal.note(traceback.format_exc().rstrip())
        return _explain(error, terminal, args.command)


def _explain(error: BaseException, terminal: Terminal, command: str) -> int:
    """Say what went wrong, and give the exit status."""
    if isinstance(error, KeyboardInterrupt):
        terminal.fail("interrupted; nothing is left half written")
        return INTERRUPTED
    if isinstance(error, MfcompileError):
        terminal.fail(str(error))
        return CHECK_FAILED if isinstance(error, (ParityError, ReproductionError)) else MISTAKE
    terminal.fail(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    terminal.note(
        f"mfcompile {command} did not expect this. Run the same command with --debug for the "
        f"traceback, and report it together with the output of mfcompile inspect"
    )
    return CHECK_FAILED


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let a request to terminate unwind like Ctrl-C, so that what was being written is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep warnings of the libraries underneath from people who cannot act on them."""
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        yield

"""The command ``async-localsgd``: finds the subcommand, and says in one line what is wrong with its arguments.

torch, Lightning and matplotlib are imported by the function that runs a subcommand, and not before: help, and what is
wrong with an argument, are there at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning_async_localsgd.cli import lighthouse, plan, simulate
from lightning_async_localsgd.cli.usage import UsageError
from lightning_async_localsgd.version import __version__

__all__ = ["main"]

PROGRAM = "async-localsgd"
# Each has `add_parser(subparsers)`, and a function from the arguments to the exit code as the default of `run`.
COMMANDS = (simulate, plan, lighthouse)

INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class OneLineParser(argparse.ArgumentParser):
    """Errors without the usage before them, which is longer than a screen and hides what was wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: what stands after the command's name; None: what the process was started with.

    Returns:
        The exit code: 0; 2 where the arguments are wrong; 130 or 143 where Ctrl-C or SIGTERM ended it early.
    """
    parser = OneLineParser(prog=PROGRAM, description="Asynchronous Local-SGD: experiments without a cluster.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(arguments)
    try:
        code: int = args.run(args)
    except UsageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return code

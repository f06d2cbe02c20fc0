"""How the command line says what it offers, and what it cannot do."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["HelpFormatter", "UsageError", "one_line", "refusals"]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults of those arguments that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class UsageError(Exception):
    """The arguments ask for something impossible; the text is one line that says what to change."""


@contextmanager
def refusals() -> Iterator[None]:
    """What is checked in here is the user's to correct: its errors need no traceback.

    Raises:
        UsageError: for a ValueError, a package that is not installed, or a file that is not there.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(one_line(error)) from error


def one_line(error: Exception) -> str:
    """An error's text without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__

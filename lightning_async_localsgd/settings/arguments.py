"""Checks of the names of keyword arguments that are passed on to another function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from inspect import Parameter, signature
from typing import Any

__all__ = ["check_names", "names_of"]


def names_of(*functions: Callable[..., Any]) -> set[str]:
    """The names of all keyword arguments of the given functions or classes."""
    parameters = [p for function in functions for p in signature(function).parameters.values()]
    return {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}


def check_names(given: Iterable[str], known: Collection[str], whose: str) -> None:
    """Refuse unknown keyword arguments.

    Args:
        given: names of the arguments.
        known: names that are accepted.
        whose: name of the called function, for the message.

    Raises:
        TypeError: if a name is unknown; suggests the closest known name.
    """
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f" Did you mean `{close[0]}`?" if close else f" Known are: {', '.join(sorted(known))}."
            raise TypeError(f"`{whose}` has no argument `{name}`.{hint}")

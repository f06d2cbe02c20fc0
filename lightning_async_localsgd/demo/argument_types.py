"""Numeric types of command-line arguments, for argparse's ``type``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ["at_least", "more_than_zero", "whole", "whole_or_auto"]


def whole(least: int) -> Callable[[str], int]:
    """Whole numbers from ``least``."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}, got {text}")
        return value

    return number


def whole_or_auto(text: str) -> int | str:
    """Whole numbers from 1, or ``auto``."""
    return text if text == "auto" else whole(1)(text)


def at_least(least: float) -> Callable[[str], float]:
    """Finite numbers from ``least``."""

    def number(text: str) -> float:
        if not (value := _number(text)) >= least:
            raise argparse.ArgumentTypeError(f"must be a number, at least {least:g}, got {text}")
        return value

    return number


def more_than_zero(text: str) -> float:
    """Finite numbers above 0."""
    if not (value := _number(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be a number, more than 0, got {text}")
    return value


def _number(text: str) -> float:
    """``text`` as a finite number; NaN otherwise."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan

"""Pace: the number of local steps per round of each worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["DynamicLocalUpdates", "FixedPace", "Pace", "make_pace"]


class Pace(Protocol):
    """A policy that sets every worker's local steps per round. Pure: the result is the same on all workers."""

    tolerance: float
    """Fraction of a round by which the round may end early to share a turn of the exchange with others."""

    def steps(self, speeds: Sequence[float], local_steps: int) -> list[int]:
        """Local steps per round of each worker.

        Args:
            speeds: measured speed of each worker in local steps per second; 0 while unknown.
            local_steps: H, the local steps per round of the fastest worker.
        """


class FixedPace:
    """Every worker makes ``H`` local steps per round, whatever its speed.

    References:
        Douillard et al. 2023, DiLoCo (arXiv 2311.08105), Algorithm 1.
    """

    tolerance = 0.0

    def steps(self, speeds: Sequence[float], local_steps: int) -> list[int]:
        """``H`` for every worker."""
        return [local_steps] * len(speeds)


class DynamicLocalUpdates:
    """DyLU: ``steps(w) = floor(v(w) / max_w' v(w') * H)``, at least 1, so that all rounds take the same time.

    A worker of unknown speed keeps ``H``. Rounds of equal duration would all end together, except for the rounding to
    whole steps and for jitter. So when one worker opens a turn, each other worker with all but ``tolerance`` of its
    round done pushes at the end of its current step. The deltas then start from the same parameters.

    Args:
        tolerance: fraction of a round by which the round may end early; 0: exactly Eq. 6.

    References:
        Liu et al. 2024, Asynchronous Local-SGD (arXiv 2401.09135), Eq. 6.
    """

    def __init__(self, tolerance: float = 0.1) -> None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"`tolerance` must be in [0, 1), got {tolerance}.")
        self.tolerance = tolerance

    def steps(self, speeds: Sequence[float], local_steps: int) -> list[int]:
        """Local steps per round of each worker, from its measured speed."""
        fastest = max(speeds, default=0.0)
        return [max(1, math.floor(v / fastest * local_steps)) if v > 0 else local_steps for v in speeds]


_PACES: dict[str, Callable[[], Pace]] = {"dylu": DynamicLocalUpdates, "fixed": FixedPace}


def make_pace(pace: str | Pace) -> Pace:
    """The policy of this name, or the policy object itself.

    Raises:
        ValueError: if ``pace`` is neither a known name nor an object with ``steps`` and ``tolerance``.
    """
    if isinstance(pace, str) and pace in _PACES:
        return _PACES[pace]()
    if not isinstance(pace, str) and callable(getattr(pace, "steps", None)) and hasattr(pace, "tolerance"):
        return pace
    raise ValueError(f"`pace` must be one of {sorted(_PACES)} or an object with `steps` and `tolerance`, got {pace!r}.")

"""The virtual clock: what happens when, in the order of virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from enum import IntEnum
from itertools import count
from typing import Any

__all__ = ["Phase", "VirtualClock"]


class Phase(IntEnum):
    """The order of events at the same time."""

    DEVICES = 0
    EXCHANGE = 1


class VirtualClock:
    """Virtual time, and the events to come. Events of the same time and phase happen in the order of their entry."""

    def __init__(self) -> None:
        self.now = 0.0
        """Virtual time in seconds."""
        self._events: list[tuple[float, Phase, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    def after(self, seconds: float, phase: Phase, happen: Callable[..., None], *arguments: Any) -> None:
        """Have a function called with these arguments, in so many seconds."""
        heapq.heappush(self._events, (self.now + seconds, phase, next(self._order), happen, arguments))

    def advance(self) -> bool:
        """Go on to the next event, and let it happen; returns whether there was one."""
        if not self._events:
            return False
        self.now, _, _, happen, arguments = heapq.heappop(self._events)
        happen(*arguments)
        return True

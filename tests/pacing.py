"""Workers of given speeds, however busy the machine: a step of 12 ms takes as long as six of 2 ms."""

from __future__ import annotations

import math
import time
from collections.abc import MutableSequence

_POLL = 0.0005  # seconds
_PATIENCE, _PATIENCE_AT_FIRST = 300, 3000  # looks, which take the longer, the busier the machine

_clock: Clock | None = None


class Clock:
    """The time of each worker, which goes by in its steps alone.

    A worker's step ends when no other is in one that ends earlier. Who makes no step for a while, because it
    validates, waits, has ended or died, is not waited for, and goes on at the others' time when it makes one again.

    Args:
        rank: rank of this process.
        times: shared by all processes: the end of each one's last step, then of each one's step under way.
    """

    def __init__(self, rank: int, times: MutableSequence[float]) -> None:
        self._rank = rank
        self._times = times
        self._size = len(times) // 2
        self._given_up: dict[int, float] = {}

    def step(self, seconds: float) -> None:
        """Take at least ``seconds``, and as long as others take for steps that end before."""
        begun = max(self._times[self._rank], max(self._times[: self._size]) - seconds)
        end = self._times[self._size + self._rank] = begun + seconds
        time.sleep(seconds)
        for other in range(self._size):
            self._await(other, end)
        self._times[self._rank] = end

    def end(self) -> None:
        """Let nobody wait for this process from now on."""
        self._times[self._size + self._rank] = math.inf

    def _await(self, other: int, end: float) -> None:
        last, looks = self._times[self._size + other], 0
        while (now := self._times[self._size + other]) < end and self._given_up.get(other) != now:
            looks = looks + 1 if now == last else 0
            if looks > (_PATIENCE if now > 0 else _PATIENCE_AT_FIRST):
                self._given_up[other] = now
            last = now
            time.sleep(_POLL)


def begin(rank: int, times: MutableSequence[float]) -> Clock:
    """Have :func:`step` keep to a clock in this process."""
    global _clock
    _clock = Clock(rank, times)
    return _clock


def step(seconds: float) -> None:
    """Take the time of a step that takes ``seconds`` on this worker."""
    if _clock is None or seconds == 0.0:
        time.sleep(seconds)
    else:
        _clock.step(seconds)

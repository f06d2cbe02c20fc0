"""How far the training thread is, as the exchange thread reads it without a lock."""

from __future__ import annotations

import math

__all__ = ["Standing"]


class Standing:
    """How far the training thread is, told at every step without a lock: it assigns single references."""

    def __init__(self) -> None:
        self._now: tuple[int, int | None, float, float] = (0, None, 0.0, 0.0)
        self._limits: tuple[float, ...] = ()
        """The number of local steps at which to wait for the outcome of each turn under way. An early answer belongs to
        a second turn."""

    def report(self, steps: int, speed: float, hold_open_seconds: float, reserve: int | None = None) -> None:
        """Tell how far the worker is, which rides on the next header.

        Args:
            steps: local steps so far.
            speed: local steps per second.
            hold_open_seconds: time for which a turn that opens now is worth holding open for this worker's next push.
            reserve: further local steps to make while a turn that opens now is under way; None: any number.
        """
        self._now = (steps, reserve, speed, hold_open_seconds)

    def may_begin_step(self) -> bool:
        """Whether to make another step now; else the outcome of a turn under way is to be waited for.

        To be called after the report of the step before.
        """
        return self._now[0] < min(self._limits, default=math.inf)

    @property
    def hold_open_seconds(self) -> float:
        """See :meth:`report`."""
        return self._now[3]

    def take(self, share_ends: int | None) -> tuple[int, int, float]:
        """For a header: local steps, further ones that are reserved (0: any number), and local steps per second.

        As :meth:`turn_is_over`, with the condition of the mailbox held.

        Args:
            share_ends: local steps at which this worker's share of the budget ends, as of the latest turn, which its
                report may not know yet; None: it has no share.
        """
        before = self._limits
        while True:
            now = self._now
            steps, reserve, speed, _ = now
            limit = min(math.inf if reserve is None else steps + reserve, *before, math.inf)
            if reserve is not None and share_ends is not None:
                limit = max(steps, min(limit, share_ends))  # a resumed worker may have passed the end of its share
            self._limits = (*before, limit)
            if self._now is now:  # else steps may have been made that did not know of the limit
                return steps, 0 if reserve is None else int(limit) - steps, speed

    def forget_turns(self) -> None:
        """The turns under way are abandoned."""
        self._limits = ()

    def turn_is_over(self) -> None:
        """The turn's outcome is published."""
        self._limits = self._limits[1:]

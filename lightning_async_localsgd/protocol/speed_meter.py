"""A speed meter: the training speed of a worker, by any clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

__all__ = ["SpeedMeter"]

_MIN_WINDOW = 8  # local steps


class SpeedMeter:
    """Measures the speed of training alone: time spent on the exchange or in a pause does not count.

    Args:
        local_steps: maximum number of local steps per round.
        clock: returns the time in seconds.
    """

    def __init__(self, local_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._busy = 0.0
        self._since: float | None = None
        self._stopped_at = clock()
        # The first entry is the end of the first step, so that warm-up and compilation do not count.
        self._marks: deque[float] = deque(maxlen=max(local_steps, _MIN_WINDOW) + 1)

    def resume(self) -> float:
        """Continue after a pause. Returns the duration of the pause in seconds."""
        self._since = self._clock()
        return self._since - self._stopped_at

    def pause(self) -> None:
        """Begin a pause."""
        if self._since is not None:
            self._stopped_at = self._clock()
            self._busy += self._stopped_at - self._since
            self._since = None

    def step(self) -> None:
        """Record the end of a local step, and begin a pause until :meth:`resume`."""
        self.pause()
        self._marks.append(self._busy)

    def speed(self, round_steps: int) -> float:
        """Local steps per second over the last ``round_steps`` (at least 8) steps; 0 while unknown."""
        steps = min(len(self._marks) - 1, max(round_steps, _MIN_WINDOW))
        if steps < 1:
            return 0.0
        seconds = self._marks[-1] - self._marks[-1 - steps]
        return steps / seconds if seconds > 0 else 0.0

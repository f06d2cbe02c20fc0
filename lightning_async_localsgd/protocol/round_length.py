"""H, the local steps per round of the fastest worker: as given, or chosen by what is known of the run. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["AUTO", "RoundLength"]

AUTO = "auto"

_LONGEST = 50  # the papers', where nothing asks for more
_MOST = 1000  # over the slowest link
_ROUNDS = 40  # of a run whose length is known
_FIRST, _ROUNDS_SO_FAR = 5, 20  # of a run whose length is not
_EXCHANGES_PER_ROUND = 2  # that would fit into a round, so that each is over before the next begins
_MOST_OVERHEAD = 0.02  # of the processor's time
_LONGER = 2  # times as long as is good for learning may a round be to cost less


class RoundLength:
    """How many local steps the fastest worker makes per round, alike on every worker.

    Rounds are as short as is cheap, for the more often workers learn from each other, the better they learn; and at
    most of 50 steps. A run of known length has 40 rounds; one without an end begins with short rounds, and each has at
    most a twentieth of the steps before it. But a round takes at least as long as two exchanges, and it is made up to
    twice as long if an exchange costs the processor more than 2% of its time. Over a slow link, or with a large model,
    rounds are as long as that asks for.

    Args:
        local_steps: H; or ``"auto"``.
        max_steps: local steps per worker that the run has; None: not known.
    """

    def __init__(self, local_steps: int | str, max_steps: int | None) -> None:
        self._given = local_steps if isinstance(local_steps, int) else None
        self._max_steps = max_steps

    @property
    def longest(self) -> int:
        """The most steps it ever gives."""
        return _MOST if self._given is None else self._given

    @property
    def usual(self) -> int:
        """The most steps it gives where exchanges are quick."""
        return _LONGEST if self._given is None else self._given

    def first(self) -> int:
        """H before anything is measured."""
        return self.next(0, 0, (), (), ())

    def next(
        self,
        now: int,
        steps_made: int,
        speeds: Sequence[float],
        exchange_seconds: Sequence[float],
        exchange_costs: Sequence[float],
    ) -> int:
        """H from here on.

        Args:
            now: H so far; 0 at the start.
            steps_made: local steps per worker, on average.
            speeds: local steps per second of each worker; 0 while unknown.
            exchange_seconds: seconds that an exchange takes each worker; 0 while unknown.
            exchange_costs: seconds of them that its processor is busy.
        """
        if self._given is not None:
            return self._given
        fastest = max(speeds, default=0.0)
        fits = _EXCHANGES_PER_ROUND * max(exchange_seconds, default=0.0) * fastest
        cheap = max((cost * speed for cost, speed in zip(exchange_costs, speeds, strict=True)), default=0.0)
        wanted = self._wanted(steps_made)
        affordable = min(cheap / _MOST_OVERHEAD, wanted * _LONGER)
        wanted = max(wanted, min(math.ceil(max(fits, affordable)), _MOST))
        # Measurements vary, and rounds shall not with each of them.
        return wanted if wanted > now or 2 * wanted <= now else now

    def _wanted(self, steps_made: int) -> int:
        """As many as are good for learning."""
        if self._max_steps is not None:
            return min(max(1, self._max_steps // _ROUNDS), _LONGEST)
        return min(max(_FIRST, steps_made // _ROUNDS_SO_FAR), _LONGEST)

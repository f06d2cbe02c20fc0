"""H, the local steps per round of the fastest worker: as given, or chosen from measurements of the run. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["AUTO", "RoundLength"]

AUTO = "auto"

_LONGEST = 50  # as in the papers, unless the exchange needs longer rounds
_MOST = 1000  # over the slowest link
_ROUNDS = 40  # of a run of known length
_FIRST, _ROUNDS_SO_FAR = 5, 20  # of a run of unknown length
_EXCHANGES_PER_ROUND = 2  # a round lasts at least as long, so that each exchange ends before the next begins
_MOST_OVERHEAD = 0.02  # of the processor's time
_LONGER = 2  # maximum factor by which the overhead lengthens a round beyond the best length for learning


class RoundLength:
    """The number of local steps per round of the fastest worker, identical on every worker; at least one per fragment.

    Short rounds learn better, so rounds are as short as is cheap, and at most 50 steps long. A run of known length has
    40 rounds. A run of unknown length begins with short rounds, and each round has at most a twentieth of the steps
    before it. A round takes at least as long as two exchanges. It is made up to twice as long if the exchange takes
    more than 2% of the processor's time. Over a slow link, or with a large model, these bounds make rounds longer than
    50 steps.

    Args:
        local_steps: H, or ``"auto"``.
        max_steps: local steps per worker of the run; None: unknown.
        fragments: number of exchanges in a round, one for each fragment of the model.
    """

    def __init__(self, local_steps: int | str, max_steps: int | None, fragments: int = 1) -> None:
        self._given = local_steps if isinstance(local_steps, int) else None
        self._max_steps = max_steps
        self._fragments = fragments

    @property
    def longest(self) -> int:
        """Maximum number of steps."""
        return _MOST if self._given is None else self._given

    @property
    def usual(self) -> int:
        """Maximum number of steps if exchanges are quick."""
        return _LONGEST if self._given is None else self._given

    def first(self) -> int:
        """H before any measurement."""
        return self.next(0, 0, (), (), ())

    def next(
        self,
        now: int,
        steps_made: int,
        speeds: Sequence[float],
        exchange_seconds: Sequence[float],
        exchange_costs: Sequence[float],
    ) -> int:
        """H from now on.

        Args:
            now: H so far; 0 at the start.
            steps_made: local steps per worker, on average.
            speeds: local steps per second of each worker; 0 while unknown.
            exchange_seconds: duration of an exchange on each worker, in seconds; 0 while unknown.
            exchange_costs: busy time of its processor in that duration, in seconds.
        """
        if self._given is not None:
            return self._given
        fastest = max(speeds, default=0.0)
        fits = _EXCHANGES_PER_ROUND * self._fragments * max(exchange_seconds, default=0.0) * fastest
        cheap = max((cost * speed for cost, speed in zip(exchange_costs, speeds, strict=True)), default=0.0)
        cheap *= self._fragments
        wanted = self._wanted(steps_made)
        affordable = min(cheap / _MOST_OVERHEAD, wanted * _LONGER)
        wanted = max(wanted, min(math.ceil(max(fits, affordable)), _MOST))
        # Measurements vary; rounds should not follow each variation.
        return wanted if wanted > now or 2 * wanted <= now else now

    def _wanted(self, steps_made: int) -> int:
        """The best number of steps for learning."""
        if self._max_steps is not None:
            wanted = min(max(1, self._max_steps // _ROUNDS), _LONGEST)
        else:
            wanted = min(max(_FIRST, steps_made // _ROUNDS_SO_FAR), _LONGEST)
        return max(wanted, self._fragments)

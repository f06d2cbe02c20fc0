"""The choice of a codec: the widest one with which an exchange takes little of a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Candidate", "CodecChoice"]

_FITS = 0.1
"""Rounds that an exchange may take. A longer one fits as well, but its delta arrives late, which costs far more than
the rounding of a narrower codec: see docs/performance.md."""
_EASILY = 0.7
"""Part of that time that an exchange may be expected to take with a wider codec than the current one."""
_MOST_BUSY = 0.5
"""Part of the time for which a link may be busy, where exchanges of fragments follow each other."""
_SMALL = 1 << 18
"""Bytes: a delta that is no larger takes its time by latency, and no codec makes it shorter."""
_LARGE = 1 << 22
"""Bytes: a delta that is larger begins with a narrower codec, until the links are known."""


class Candidate(NamedTuple):
    """A codec to choose from."""

    name: str
    wire_bytes: int
    """Size of a delta on the wire."""


class CodecChoice:
    """Chooses the codec of each turn. Decides alike on every worker, since it goes by the headers alone.

    Args:
        candidates: the codecs, the widest first. Of a single one there is no choice.
        fragments: number of exchanges in a round.
    """

    def __init__(self, candidates: Sequence[Candidate], fragments: int = 1) -> None:
        self._candidates = candidates
        self._fits = min(_FITS, _MOST_BUSY / fragments)
        self._bytes = dict(candidates)

    def first(self) -> str:
        """The codec to begin with, while nothing is known of the links."""
        widest = self._candidates[0]
        if widest.wire_bytes <= _LARGE:
            return widest.name
        return next((c.name for c in self._candidates if c.wire_bytes <= 0.3 * widest.wire_bytes), self.narrowest)

    @property
    def narrowest(self) -> str:
        """The codec with the fewest bytes."""
        return self._candidates[-1].name

    def next(self, current: str, exchange_seconds: Sequence[float], round_seconds: float) -> str:
        """The codec of the next turn.

        Time is taken to be proportional to bytes. Where latency or computing takes a part of it, a narrower codec saves
        less than that, and the next measurement says so.

        Args:
            current: the codec of now.
            exchange_seconds: how long an exchange takes each worker with it; 0 while unknown.
            round_seconds: duration of a round of the fastest worker; 0 while unknown.
        """
        slowest = max(exchange_seconds)
        if slowest == 0 or round_seconds == 0 or self._candidates[0].wire_bytes <= _SMALL:
            return current
        per_byte = slowest / self._bytes[current]
        for name, wire_bytes in self._candidates:
            part = self._fits * (_EASILY if wire_bytes > self._bytes[current] else 1)
            if per_byte * wire_bytes <= part * round_seconds:
                return name
        return self.narrowest

"""Slices: the part of the flat vector that each worker adds up for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

__all__ = ["UNIT", "Span", "owned_slices", "slice_shares"]

UNIT = 4096
"""Elements: slices begin at multiples of it, so that codecs which write blocks see the same blocks in any cut."""

_FASTEST = 125e6
"""Bytes per second: a faster link is not what an exchange waits for."""
_STEP = 4.0
"""Links are told apart by powers of it: smaller differences are noise of the measurement."""


class Span(NamedTuple):
    """A range of elements of the flat vector."""

    start: int
    stop: int


def slice_shares(links: Sequence[float]) -> list[float]:
    """The share of the vector that each worker is to own, by rank, so that an exchange is over soonest.

    A worker that owns the share ``a`` of a vector of S bytes, among k workers, sends and receives ``S (1 + a (k - 2))``
    bytes. So a worker with a slow link owns little or nothing.

    Args:
        links: bytes per second of each worker's link.
    """
    k = len(links)
    if k <= 2:
        return [1 / k] * k
    fastest = min(max(links), _FASTEST)
    rates = [_STEP ** round(math.log(min(link, fastest) / fastest, _STEP)) for link in links]
    # The time t in which all are done, in S over the rate of the fastest: each worker is given what fits into it. The
    # owners are the fastest workers: adding one more lowers t as long as t is above the time it takes to own nothing.
    owners = sorted(set(rates), reverse=True)
    for i, slowest in enumerate(owners):
        of_owners = [rate for rate in rates if rate >= slowest]
        t = (k - 2 + len(of_owners)) / sum(of_owners)
        if i + 1 == len(owners) or t <= 1 / owners[i + 1]:
            break
    return [max(0.0, (t * rate - 1) / (k - 2)) if rate >= slowest else 0.0 for rate in rates]


def owned_slices(numel: int, shares: Sequence[float]) -> list[Span]:
    """The slice of each worker, by rank; a worker that owns nothing has an empty one.

    Args:
        numel: elements of the vector.
        shares: the share of each worker. They add up to 1.
    """
    units = -(-numel // UNIT)
    bounds = [0, *(min(numel, UNIT * round(units * share)) for share in accumulate(shares))]
    bounds[-1] = numel
    return [Span(start, stop) for start, stop in pairwise(bounds)]

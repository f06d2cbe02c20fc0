"""A turn of the exchange: who holds it open, and what each worker's header says of its pushed round."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.protocol.rules import Rules

__all__ = ["PushedRound", "add_round", "may_push", "turn_interval"]

_NONE_TO_COME = Flag.IDLE | Flag.FINAL | Flag.ABORT | Flag.PAUSED


class PushedRound(NamedTuple):
    """A finished round, as its header tells of it."""

    round: int
    """Rounds that the worker has pushed before it."""
    steps: int
    samples: int
    seconds: float
    """Duration from its first step to its last."""
    shard: int
    start_version: int
    """Version of the fragment's global parameters that its delta is counted from."""
    fragment: int = 0
    """The fragment of the model that its delta is of."""
    fragment_steps: int = 0
    """Local steps that the delta holds: those since the fragment's last push."""


def turn_interval(progress: Progress, rules: Rules) -> float:
    """Minimum seconds between the beginnings of two turns that a push opens.

    It bounds the traffic of a round, however many workers there are. A worker whose round ends sooner extends it. One
    that does not train while its delta is exchanged would be idle instead, so without overlap there is no minimum. By
    itself it is twice the time of an exchange, and at most half a round: where an exchange takes no time, fresh deltas
    are worth more than the traffic. With fragments, a turn trades one of them, and there are as many more turns.

    Args:
        progress: shared progress of now.
        rules: settings of the run.
    """
    fastest = max(progress.speeds)
    if not rules.overlap or fastest == 0:
        return 0.0
    round_seconds = progress.local_steps / rules.fragments / fastest  # a push is due that often
    if isinstance(rules.turns_per_round, str):
        return min(round_seconds / 2, 2 * progress.exchange_seconds)
    return round_seconds / rules.turns_per_round


def may_push(flags: Flag, has_delta: bool) -> bool:
    """Whether a push of a worker can still come in this turn, so that it may hold the turn open.

    Args:
        flags: the worker's.
        has_delta: whether it has pushed already.
    """
    return not has_delta and not flags & _NONE_TO_COME


def add_round(header: Header, pushed: PushedRound | None, finite: bool) -> Header:
    """The header with the round whose delta the worker brings to the turn.

    Args:
        header: the worker's header.
        pushed: its round; None: it brings no delta.
        finite: whether every parameter of the delta can be sent; else it is dropped.
    """
    if pushed is None:
        return header
    return replace(
        header,
        flags=header.flags | (Flag.DELTA if finite else Flag.DROPPED),
        round=pushed.round,
        round_steps=pushed.steps,
        round_samples=pushed.samples,
        round_seconds=pushed.seconds,
        shard=pushed.shard,
        fragment=pushed.fragment,
        start_version=pushed.start_version,
    )

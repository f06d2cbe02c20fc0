"""A virtual mailbox: where the training thread and the exchange thread of a virtual worker meet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_async_localsgd.protocol.header import Flag
from lightning_async_localsgd.protocol.turn import PushedRound

__all__ = ["Adoption", "Push", "VirtualMailbox"]


@dataclass(frozen=True)
class Push:
    """A finished round on its way. Times are virtual, in seconds."""

    round: PushedRound
    loss: float
    """Sum of the training losses of its local steps."""
    begin: float
    end: float
    all_steps: int
    """Local steps that all workers had made at its end."""


@dataclass(frozen=True)
class Adoption:
    """New global parameters for a worker."""

    fragment: int
    versions: tuple[int, ...]
    """Version of each fragment."""
    restart: bool
    """Whether its delta was dropped, so that it begins again from them."""


@dataclass
class VirtualMailbox:
    """What the two threads of a virtual worker know of each other."""

    flags: Flag = Flag.FINAL  # who is not there has nothing more to say
    steps: int = 0
    """Local steps, as its next header tells."""
    reserve: int | None = None
    """Further local steps to make while a turn is under way, as its next header tells; None: any number."""
    limit: float = math.inf
    """The number of local steps at which to wait for the outcome of the turn under way."""
    speed: float = 0.0
    """Local steps per second, as its next header tells."""
    hold_open_seconds: float = 0.0
    """Seconds for which it is worth holding a turn open for its push."""
    news: bool = False
    """Whether the training thread has something to tell that no header has told."""
    push: Push | None = None
    """A push that the exchange has not taken yet."""
    pending: Push | None = None
    """A push that the exchange has taken and not settled yet."""
    adoption: Adoption | None = None
    """Global parameters that the training thread has not adopted yet."""

    @property
    def in_flight(self) -> bool:
        """Whether the adoption of the worker's last push is still to come."""
        return self.push is not None or self.pending is not None or self.adoption is not None

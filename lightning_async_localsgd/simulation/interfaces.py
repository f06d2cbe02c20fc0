"""Interfaces of the timeline: what learns, and what is told of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.protocol.ledger import Group
from lightning_async_localsgd.protocol.progress import OuterUpdate, Progress
from lightning_async_localsgd.protocol.rounds import Rounds

__all__ = ["FinishedRound", "Learned", "Observer", "Replicas"]


class Learned(NamedTuple):
    """What a worker's local steps since its last push have seen."""

    samples: int
    loss: float
    """Sum of the training losses of those steps."""


class Replicas(Protocol):
    """What the workers of a timeline learn. The timeline tells in which order."""

    def join(self, worker: int) -> None:
        """A worker begins, with the global parameters of now."""

    def step(self, worker: int, rounds: Rounds, progress: Progress) -> None:
        """A worker begins a local step, knowing this; it will end before anything else is said of this worker."""

    def push(self, worker: int, fragment: int) -> Learned:
        """A worker pushes a fragment. Said again before the delta has been traded, it does so here instead."""

    def finite(self, worker: int) -> bool:
        """Whether the delta of the round that a worker has pushed can be sent."""

    def trade(self, groups: Sequence[Group], codec: Codec) -> Iterator[Group]:
        """Bring the sum of one group's accepted deltas after the other into the pseudo-gradient of its fragment.

        Yields:
            Each group, once its sum is there.
        """

    def publish(self, workers: Sequence[int]) -> None:
        """These workers are to adopt the pushed fragment's global parameters of now, when they get to it."""

    def adopt(self, worker: int, restart: bool) -> None:
        """A worker adopts what was published for it; what it has learned since its push stays.

        If it restarts, it adopts all fragments, and nothing stays.
        """


@dataclass(frozen=True)
class FinishedRound:
    """A round whose delta has come to the others."""

    worker: int
    round: int
    begin: float
    """Virtual time in seconds."""
    end: float
    adopted: float
    """Virtual time at which the new global parameters were there."""
    local_steps: int
    all_steps: int
    """Local steps that all workers had made at its end."""
    loss: float
    """Mean training loss."""


class Observer(Protocol):
    """Who is told what happens."""

    def updated(self, time: float, updates: Sequence[OuterUpdate]) -> None:
        """Deltas were applied."""

    def finished(self, rounds: Sequence[FinishedRound]) -> None:
        """Rounds are over. The global state stands still meanwhile."""

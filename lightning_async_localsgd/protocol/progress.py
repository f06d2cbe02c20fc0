"""The shared progress of a run, identical on every worker after each turn, and its outer updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "NO_REFERENCE_TURN",
    "OuterUpdate",
    "Progress",
    "ReferenceTurn",
]


class OuterUpdate(NamedTuple):
    """One applied delta, as reported to every worker."""

    version: int
    """Version of the global parameters after the update."""
    worker: int
    round: int
    local_steps: int
    samples: int
    staleness: int
    """Versions that passed between the start of the round and the application of its delta."""
    seconds: float
    """Duration of the round, from its first step to its last."""
    norm: float | None = None
    """L2 norm of the delta, or of the mean delta with a quorum; None if not measured."""
    alignment: float | None = None
    """Cosine between that delta and the outer momentum; NaN without momentum, None if not measured."""


class ReferenceTurn(NamedTuple):
    """The latest turn that applied a delta of worker 0. The other workers time their rounds by it."""

    round: int
    """Worker 0's round; 0 before its first."""
    workers: tuple[int, ...]
    """Ranks of the workers with a delta in that turn."""


NO_REFERENCE_TURN = ReferenceTurn(0, ())


@dataclass(frozen=True)
class Progress:
    """Shared progress after a turn: computed from the headers, identically on every worker."""

    version: int
    steps: tuple[int, ...]
    """Local steps of each worker, at its last header."""
    speeds: tuple[float, ...]
    """Local steps per second of each worker; 0 while unknown."""
    round_steps: tuple[int, ...]
    """Local steps per round of each worker, from the pace."""
    caps: tuple[int, ...] | None
    """Local steps at which each worker stops; None: no limit."""
    exhausted: bool
    """Whether nothing of the shared budget is left to divide: nobody gets more than its share."""
    stop: bool
    """Whether a worker has asked all to end their training."""
    over: bool
    """Whether every worker has pushed all of its steps and every delta is applied."""
    shard_samples: tuple[int, ...]
    reference_turn: ReferenceTurn
    local_steps: int
    """H, local steps per round of the fastest worker."""
    fragment: int = 0
    """The fragment that is to be pushed next, unless another is overdue."""
    exchange_seconds: float = 0.0
    """Time of an exchange of the slowest worker; 0 while unknown."""
    codec: str = ""
    """Name of the codec of the next turn; empty where nothing is written."""
    updates: int = 0
    total_staleness: int = 0
    max_staleness: int = 0
    dropped: tuple[int, ...] = ()
    former_steps: int = 0
    """Local steps, applied, of processes that are gone and in whose place others have come."""
    bytes_sent: int = 0
    bytes_received: int = 0

    @property
    def total_steps(self) -> int:
        """Local steps of all workers together, at their last headers."""
        return sum(self.steps) + self.former_steps

    @classmethod
    def at_start(cls, workers: int, local_steps: int) -> Progress:
        """The progress of a new run."""
        nothing = (0,) * workers
        return cls(
            version=0,
            steps=nothing,
            speeds=(0.0,) * workers,
            round_steps=(local_steps,) * workers,
            caps=None,
            exhausted=False,
            stop=False,
            over=False,
            shard_samples=nothing,
            reference_turn=NO_REFERENCE_TURN,
            local_steps=local_steps,
            dropped=nothing,
        )

"""The settings of the protocol."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

from lightning_async_localsgd.protocol.pace import Pace
from lightning_async_localsgd.protocol.round_length import RoundLength

__all__ = ["Rules"]


class Rules(Protocol):
    """The part of :class:`~lightning_async_localsgd.Settings` that decisions of the protocol depend on."""

    @property
    def pace(self) -> str | Pace:
        """The policy that sets each worker's local steps per round, or its name."""

    @property
    def grace_period(self) -> float:
        """Seconds for which a turn is held open for a worker that is about to push."""

    @property
    def quorum(self) -> int:
        """Number of deltas in an outer update."""

    @property
    def fragments(self) -> int:
        """Number of parts of the model that are pushed in turn, each once in a round."""

    @property
    def turns_per_round(self) -> float | str:
        """Maximum number of turns that pushes open in a round of the fastest worker; ``"auto"``: by their time."""

    @property
    def overlap(self) -> bool:
        """Whether workers train while their delta is exchanged."""

    @property
    def timeout(self) -> timedelta:
        """Time after which a silent worker is lost."""

    def round_length(self, max_steps: int | None) -> RoundLength:
        """The policy that sets H in a run of ``max_steps`` local steps per worker; None: unknown."""

    def lockstep(self, workers: int) -> bool:
        """Whether every worker's delta, of H steps each, is in every outer update."""

    def shares_budget(self, workers: int) -> bool:
        """Whether fast workers make more of the job's steps."""

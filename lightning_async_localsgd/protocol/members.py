"""The members of a run whose workers come and go: which of those that are there take part. Pure: no clock, no network.

A quorum's answer lists everyone who asked, with what each told. All who asked read the same answer, so all that
:func:`choose_view` makes of it is agreed upon.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["NO_STATE", "Candidate", "Member", "View", "choose_view"]


NO_STATE = (-1, 0)
"""The position of a worker that has nothing of the run."""


class Member(NamedTuple):
    """A worker's process. Members are in the order of their names."""

    name: str
    """The worker's name, which a process keeps that is started in its place."""
    incarnation: str
    """Of the process: no two have the same, and a later one of the same worker sorts after it."""
    host: str
    port: int
    """Where it listens for the others."""


@dataclass(frozen=True)
class Candidate:
    """What a process tells with its question for a quorum."""

    member: Member
    attempt: int = 0
    """The least number of the view that it asks for: one more than that of a view that has failed."""
    unreachable: frozenset[str] = frozenset()
    """Incarnations of members that it could not connect to."""
    position: tuple[int, int] = NO_STATE
    """How far its copy of the run is: the number of its next turn, and its version."""
    count: int = 0
    """Of its questions: what it has told later counts."""


class View(NamedTuple):
    """Members that exchange with each other, until the next view."""

    members: tuple[Member, ...]
    attempt: int
    quorum: int = 0
    """Number of the quorum: the same members can meet again, later."""

    @property
    def key(self) -> str:
        """The same for all members of the view, and for no other view."""
        text = repr((self.quorum, self.attempt, self.members))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def rank_of(self, incarnation: str) -> int | None:
        """The rank of a process among the members; None: it is none of them."""
        return next((rank for rank, member in enumerate(self.members) if member.incarnation == incarnation), None)


def choose_view(
    candidates: Iterable[Candidate], min_workers: int = 1, max_workers: int | None = None, quorum: int = 0
) -> View | None:
    """The members that are to exchange with each other, of those in a quorum's answer.

    Of two processes of one name the later one takes part. Of two that cannot reach each other one does: whoever has the
    most of such troubles is left out first; of equals, one without the run's state, then the last in the order of
    names. Of more than ``max_workers``, those without the run's state are left out first, then the last.

    Args:
        candidates: in any order.
        min_workers: the least number of members.
        max_workers: the largest number of members; None: no limit.
        quorum: number of the quorum.

    Returns:
        The view; None: too few can reach each other.
    """
    latest: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: (c.member.incarnation, c.count)):
        latest[candidate.member.name] = candidate
    chosen = sorted(latest.values(), key=lambda c: (c.position == NO_STATE, c.member.name))
    while (troubles := _troubles(chosen)) and max(troubles) > 0:
        worst = max(range(len(chosen)), key=lambda i: (troubles[i], i))
        del chosen[worst]
    members = tuple(sorted(candidate.member for candidate in chosen[:max_workers]))
    if len(members) < min_workers:
        return None
    return View(members, max((candidate.attempt for candidate in latest.values()), default=0), quorum)


def _troubles(chosen: Sequence[Candidate]) -> list[int]:
    """With how many of the others each has no connection."""
    return [
        sum(
            other.member.incarnation in candidate.unreachable or candidate.member.incarnation in other.unreachable
            for other in chosen
            if other is not candidate
        )
        for candidate in chosen
    ]

"""The accounts of workers that come and go: who is there, and what of each one's steps has been applied. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.members import Member

__all__ = ["Account", "Accounts"]


@dataclass
class Account:
    """What the run knows of a worker. A worker keeps its number in the run while it is away."""

    name: str
    incarnation: str
    """Of its latest process."""
    present: bool = True
    applied_steps: int = 0
    """Local steps of that process which are applied."""
    settled_rounds: int = 0
    """Rounds of that process whose deltas are applied or refused."""


class Accounts:
    """All workers that were ever there, by their number in the run, alike on all that are there now.

    Steps of a worker that is gone count as far as they were applied: what it had not pushed is lost, and the others
    make these steps.
    """

    def __init__(self) -> None:
        self.workers: list[Account] = []
        self.former_steps = 0
        """Applied local steps of processes in whose place another one has come."""

    @property
    def present(self) -> list[bool]:
        """Whether each worker is there."""
        return [worker.present for worker in self.workers]

    @property
    def leader(self) -> int:
        """The lowest number of those that are there."""
        return next((i for i, worker in enumerate(self.workers) if worker.present), 0)

    def number_of(self, member: Member) -> int:
        """The number of a member."""
        return next(i for i, worker in enumerate(self.workers) if worker.name == member.name)

    def meet(self, members: Sequence[Member]) -> None:
        """These are there from now on, and no others. Whoever was never there gets the next number."""
        names = {member.name for member in members}
        for worker in self.workers:
            worker.present = worker.name in names
        known = {worker.name: worker for worker in self.workers}
        for member in members:
            if member.name not in known:
                self.workers.append(Account(member.name, member.incarnation))
                continue
            worker = known[member.name]
            if worker.incarnation != member.incarnation:
                self.former_steps += worker.applied_steps
                worker.incarnation, worker.applied_steps, worker.settled_rounds = member.incarnation, 0, 0

    def settle(self, header: Header, accepted: bool) -> None:
        """A worker's delta has been applied, or refused."""
        worker = self.workers[header.worker]
        worker.settled_rounds = header.round + 1
        if accepted:
            worker.applied_steps += header.round_steps

    def with_absent(self, headers: Sequence[Header]) -> list[Header]:
        """The header of each worker, by number: those that are away make no step and send nothing.

        Args:
            headers: of those that are there.
        """
        given = {header.worker: header for header in headers}
        turn = headers[0].turn
        return [
            given.get(i) or Header(i, turn, flags=Flag.FINAL, steps=worker.applied_steps)
            for i, worker in enumerate(self.workers)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The accounts as JSON values."""
        return {"workers": [asdict(worker) for worker in self.workers], "former_steps": self.former_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` has told."""
        self.workers = [Account(**worker) for worker in state["workers"]]
        self.former_steps = state["former_steps"]

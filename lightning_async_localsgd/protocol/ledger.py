"""The ledger: the effect of a turn's headers on global state and shared progress. Pure: no clock, no network."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, count
from typing import NamedTuple, Protocol

from lightning_async_localsgd.protocol.accounts import Accounts
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.codec_choice import CodecChoice
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.members import Member
from lightning_async_localsgd.protocol.pace import make_pace
from lightning_async_localsgd.protocol.progress import OuterUpdate, Progress, ReferenceTurn
from lightning_async_localsgd.protocol.rules import Rules

__all__ = ["Arrival", "DueDelta", "FragmentState", "Group", "Ledger", "LedgerState"]


class Arrival(NamedTuple):
    """One worker's delta in an outer update."""

    worker: int
    staleness: int
    """Versions that passed between the start of the worker's round and this update."""


class DueDelta(NamedTuple):
    """A delta that is applied in a turn, or refused."""

    header: Header
    arrival: Arrival
    accepted: bool
    """Whether it is applied. If not, it is not sent, and counts as a version."""


class Group(NamedTuple):
    """Deltas that make one outer update of a fragment together."""

    fragment: int
    deltas: list[DueDelta]
    """In rank order."""

    @property
    def senders(self) -> list[int]:
        """The workers whose deltas are applied."""
        return [delta.header.worker for delta in self.deltas if delta.accepted]


class FragmentState(Protocol):
    """The state of a fragment: a :class:`~lightning_async_localsgd.outer.GlobalState` or a stand-in."""

    version: int

    def update_sizes(self, count: int) -> list[int]:
        """The number of deltas in each outer update of a turn that brings ``count`` deltas, in order."""

    def accepts(self, arrival: Arrival) -> bool:
        """Whether this delta is to be applied at all."""

    def apply(self, arrivals: Sequence[Arrival], refused: int = 0) -> None:
        """Make one outer update of the sum of these deltas, and count so many more that are not applied."""


class LedgerState(Protocol):
    """The state that the ledger updates: a :class:`~lightning_async_localsgd.outer.GlobalModel` or a stand-in."""

    @property
    def fragments(self) -> Sequence[FragmentState]:
        """The state of each fragment."""

    @property
    def version(self) -> int:
        """Number of outer updates of all fragments."""

    def set_round_length(self, local_steps: int) -> None:
        """Set H, local steps per round of the fastest worker, from now on."""


class Ledger:
    """Tracks the progress of a run, identically on every worker, because all read the same headers.

    In each turn, :meth:`due` returns the deltas to apply, in groups. The accepted deltas of each group are summed as
    the pseudo-gradient of the fragment's state, and :meth:`apply` makes an outer update of it. :meth:`close_turn`
    returns the shared progress. The real exchange and the simulated one share this class.

    Args:
        state: the global state.
        rules: settings of the run.
        budget: the budget of the run.
        progress: the progress at the start, zero or resumed.
        codec_choice: chooses the codec of each turn; None: nothing is written.
        accounts: of workers that come and go; None: all are there from the beginning to the end.
    """

    def __init__(
        self,
        state: LedgerState,
        rules: Rules,
        budget: Budget,
        progress: Progress,
        codec_choice: CodecChoice | None = None,
        accounts: Accounts | None = None,
    ) -> None:
        self.accounts = accounts
        """Of workers that come and go; None: all are there from the beginning to the end."""
        self._state = state
        self._rules = rules
        self._budget = budget
        self._pace = make_pace(rules.pace)
        self._round_length = rules.round_length(budget.max_steps)
        self._codec_choice = codec_choice
        self._take_over(progress)
        self.codec = "" if codec_choice is None else codec_choice.first()
        """Name of the codec of the turn of now."""

    def _take_over(self, progress: Progress) -> None:
        self._progress = progress
        self.steps: Sequence[int] = progress.steps
        """Local steps of each worker, at its last header."""
        self._updates = progress.updates
        self._total_staleness = progress.total_staleness
        self._max_staleness = progress.max_staleness
        self._dropped = list(progress.dropped)
        self._shard_samples = list(progress.shard_samples)
        self._reference_turn = progress.reference_turn
        self._local_steps = progress.local_steps
        self._fragment = progress.fragment
        self._state.set_round_length(self._local_steps)

    @property
    def _leader(self) -> int:
        """The worker that the others adjust their rounds to."""
        return 0 if self.accounts is None else self.accounts.leader

    # ---- workers that come and go -----------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """Shared progress of now: after the latest turn, and the updates since then."""
        return replace(
            self._progress,
            version=self._state.version,
            updates=self._updates,
            total_staleness=self._total_staleness,
            max_staleness=self._max_staleness,
            shard_samples=tuple(self._shard_samples),
        )

    @property
    def budget(self) -> Budget:
        """The budget of the run."""
        return self._budget

    def go_on_from(self, progress: Progress, budget: Budget) -> None:
        """Go on from another worker's :attr:`progress`, whose accounts are those of here.

        Args:
            progress: of that worker.
            budget: of the run.
        """
        self._budget = budget
        self._round_length = self._rules.round_length(budget.max_steps)
        self._take_over(progress)
        self.codec = progress.codec

    def meet(self, members: Sequence[Member]) -> Progress:
        """These members are there from now on; returns the shared progress.

        Whoever has come has no share of the budget before the next turn. Steps that were not applied of those who are
        gone are left to the others.
        """
        assert self.accounts is not None
        known = [(worker.name, worker.incarnation) for worker in self.accounts.workers]
        self.accounts.meet(members)
        self._budget = replace(self._budget, spent=self.accounts.former_steps)
        now = self.progress
        steps, caps, speeds = list(now.steps), list(now.caps or now.steps), list(now.speeds)
        round_steps, dropped = list(now.round_steps), list(now.dropped)
        for i, worker in enumerate(self.accounts.workers):
            if i == len(known):
                known.append(("", ""))
                speeds.append(0.0)
                for counts in (steps, caps, round_steps, dropped):
                    counts.append(0)
            back = worker.present and round_steps[i] == 0
            if back or not worker.present or known[i] != (worker.name, worker.incarnation):
                steps[i] = caps[i] = worker.applied_steps
                speeds[i] = 0.0
                round_steps[i] = self._local_steps if worker.present else 0
        progress = replace(
            now,
            steps=tuple(steps),
            speeds=tuple(speeds),
            caps=None if now.caps is None else tuple(caps),
            round_steps=tuple(round_steps),
            dropped=tuple(dropped),
            former_steps=self._budget.spent,
            over=False,
        )
        self._take_over(progress)
        return progress

    # ---- turns ------------------------------------------------------------------------------------------------------

    def due(self, headers: Sequence[Header]) -> list[Group]:
        """The deltas to apply in this turn, in rank order: each group makes one outer update of a fragment.

        With ``quorum=1`` the accepted deltas of a fragment are split as its state tells. A refused delta is in the
        group of the next accepted one, or in the last group. With a larger quorum all its deltas are one group, as soon
        as there are enough of them, or no other worker will send one.
        """
        sent = [header for header in headers if Flag.DELTA in header.flags]
        return [
            Group(fragment, deltas)
            for fragment in sorted({header.fragment for header in sent})
            for deltas in self._due_of(fragment, headers)
        ]

    def _due_of(self, fragment: int, headers: Sequence[Header]) -> list[list[DueDelta]]:
        state = self._state.fragments[fragment]
        deltas = self._deltas(fragment, headers)
        ends = list(accumulate(state.update_sizes(sum(delta.accepted for delta in deltas))))
        groups: list[list[DueDelta]] = [[] for _ in ends or deltas[:1]]
        accepted = 0
        for delta in deltas:
            groups[min(bisect_right(ends, accepted), len(groups) - 1)].append(delta)
            accepted += delta.accepted
        return groups

    def _deltas(self, fragment: int, headers: Sequence[Header]) -> list[DueDelta]:
        """All deltas of a fragment to apply in this turn, with the staleness that each will have."""
        state = self._state.fragments[fragment]
        deltas = [h for h in headers if Flag.DELTA in h.flags and h.fragment == fragment]
        if self._rules.quorum > 1 and not self._meets_quorum(headers, len(deltas)):
            return []
        versions = count(state.version, 1 if self._rules.quorum == 1 else 0)
        arrivals = [Arrival(h.worker, version - h.start_version) for h, version in zip(deltas, versions, strict=False)]
        return [DueDelta(h, arrival, state.accepts(arrival)) for h, arrival in zip(deltas, arrivals, strict=True)]

    def _meets_quorum(self, headers: Sequence[Header], deltas: int) -> bool:
        none_to_come = Flag.DELTA | Flag.FINAL
        if not self._budget.exhausted([h.steps for h in headers], self._reserved(headers)):
            none_to_come |= Flag.IDLE  # these push their remaining steps at the end of the run
        quorum = self._rules.quorum if self.accounts is None else min(self._rules.quorum, sum(self.accounts.present))
        return deltas >= quorum or all(h.flags & none_to_come for h in headers)

    def apply(self, group: Group, norm: float | None = None, alignment: float | None = None) -> list[OuterUpdate]:
        """Make one outer update of a group's accepted deltas, whose sum is in the state's pseudo-gradient.

        Args:
            group: a group that :meth:`due` has returned, in order.
            norm: L2 norm of the mean of the accepted deltas, if measured.
            alignment: cosine between their mean and the outer momentum, if measured.
        """
        fragment, deltas = group
        arrivals = [arrival for _, arrival, accepted in deltas if accepted]
        version = self._state.version
        self._state.fragments[fragment].apply(arrivals, refused=len(deltas) - len(arrivals))
        self._updates += len(deltas)
        self._total_staleness += sum(arrival.staleness for _, arrival, _ in deltas)
        self._max_staleness = max(self._max_staleness, *(arrival.staleness for _, arrival, _ in deltas))
        for header, _, accepted in deltas:
            self._shard_samples[header.shard] += header.round_samples
            if self.accounts is not None:
                self.accounts.settle(header, accepted)
        return [
            OuterUpdate(
                version=min(version + i, self._state.version),
                worker=header.worker,
                round=header.round,
                local_steps=header.round_steps,
                samples=header.round_samples,
                staleness=arrival.staleness,
                seconds=header.round_seconds,
                norm=norm,
                alignment=alignment,
            )
            for i, (header, arrival, _) in enumerate(deltas, start=1)
        ]

    def close_turn(
        self,
        headers: Sequence[Header],
        applied: Sequence[Header],
        bytes_sent: int = 0,
        bytes_received: int = 0,
    ) -> Progress:
        """The shared progress after a turn.

        Args:
            headers: the headers of all workers.
            applied: the headers of the applied and the refused deltas.
            bytes_sent: total bytes sent by this worker; with ``bytes_received`` the only value of its own.
            bytes_received: total bytes received by this worker.
        """
        dropped = [header.worker for header in headers if Flag.DROPPED in header.flags]
        for worker in dropped:
            self._dropped[worker] += 1
            if self.accounts is not None:
                self.accounts.settle(headers[worker], accepted=False)
        if applied:
            self._fragment = (applied[0].fragment + 1) % len(self._state.fragments)
        for header in applied:
            if header.worker == self._leader:
                self._reference_turn = ReferenceTurn(header.round, tuple(h.worker for h in applied))
        self.steps = tuple(h.steps for h in headers)
        speeds = tuple(h.speed for h in headers)
        self._local_steps = self._round_length.next(
            self._local_steps,
            sum(self.steps) // self._budget.workers,
            speeds,
            [h.exchange_seconds for h in headers],
            [h.exchange_cost for h in headers],
        )
        self._state.set_round_length(self._local_steps)
        self._choose_codec(headers)
        round_steps = self._pace.steps(speeds, self._local_steps)
        if self.accounts is not None:
            present = self.accounts.present
            round_steps = [steps if there else 0 for steps, there in zip(round_steps, present, strict=True)]
        reserved = self._reserved(headers)
        final = [Flag.FINAL in h.flags for h in headers]
        self._progress = Progress(
            version=self._state.version,
            steps=self.steps,
            speeds=speeds,
            round_steps=tuple(round_steps),
            caps=self._budget.caps(self.steps, round_steps, reserved, final),
            exhausted=self._budget.exhausted(self.steps, reserved),
            stop=any(Flag.STOP in h.flags for h in headers),
            over=all(final),
            shard_samples=tuple(self._shard_samples),
            reference_turn=self._reference_turn,
            local_steps=self._local_steps,
            fragment=self._fragment,
            exchange_seconds=max(h.exchange_seconds for h in headers),
            codec=self.codec,
            updates=self._updates,
            total_staleness=self._total_staleness,
            max_staleness=self._max_staleness,
            dropped=tuple(self._dropped),
            former_steps=self._budget.spent,
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
        )
        return self._progress

    def _choose_codec(self, headers: Sequence[Header]) -> None:
        if self._codec_choice is not None:
            fastest = max(h.speed for h in headers)
            round_seconds = self._local_steps / fastest if fastest else 0.0
            self.codec = self._codec_choice.next(self.codec, [h.exchange_seconds for h in headers], round_seconds)

    @staticmethod
    def _reserved(headers: Sequence[Header]) -> list[int]:
        """Local steps that each worker may make before it learns of this turn's outcome; of one that has ended none."""
        return [0 if Flag.FINAL in h.flags else h.reserved for h in headers]

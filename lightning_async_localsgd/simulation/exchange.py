"""The virtual exchange: what the exchange threads of all workers do in a turn, under the virtual clock.

The decisions are those of a real run: ``protocol/turn.py`` says who may hold a turn open and what a header tells, and
the :class:`~lightning_async_localsgd.protocol.ledger.Ledger` says what becomes of the deltas.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.protocol.header import HEADER_BYTES, Flag, Header
from lightning_async_localsgd.protocol.ledger import Group, Ledger, LedgerState
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.protocol.turn import add_round, may_push, turn_interval
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.clock import Phase, VirtualClock
from lightning_async_localsgd.simulation.interfaces import FinishedRound, Observer, Replicas
from lightning_async_localsgd.simulation.mailbox import Adoption, Push, VirtualMailbox
from lightning_async_localsgd.simulation.network import Network

__all__ = ["DeltaCosts", "VirtualExchange"]


@dataclass(frozen=True)
class DeltaCosts:
    """What a delta takes of the network and of the exchange threads."""

    elements: tuple[int, ...]
    """Of each fragment of the model."""
    sums: bool
    """Whether the deltas of a turn are added up on their way."""
    update_seconds: float = 0.0
    """Virtual seconds that an outer update takes each exchange thread."""
    turn_seconds: float = 0.0
    """Virtual seconds that a turn with deltas takes each exchange thread for its own."""


class VirtualExchange:
    """The exchange of all virtual workers, turn by turn.

    Args:
        mailboxes: of each worker, where its training thread and the exchange meet.
        settings: settings of the run.
        state: what outer updates move.
        ledger: the books of the run.
        progress: what the run starts from.
        replicas: what learns.
        observer: what is told of updates.
        network: between the workers.
        costs: of a delta.
        clock: the virtual clock.
        after_turn: called at the end of a turn, with the rounds whose deltas it has settled.
    """

    def __init__(
        self,
        mailboxes: Sequence[VirtualMailbox],
        settings: Settings,
        state: LedgerState,
        ledger: Ledger,
        progress: Progress,
        replicas: Replicas,
        observer: Observer,
        network: Network,
        costs: DeltaCosts,
        clock: VirtualClock,
        after_turn: Callable[[list[FinishedRound]], None],
    ) -> None:
        size = len(mailboxes)
        self.progress = progress
        """Shared progress after the latest turn."""
        self.bytes_sent = [0] * size
        """By each worker."""
        self.bytes_received = [0] * size
        """By each worker."""
        self._mailboxes = mailboxes
        self._settings = settings
        self._state = state
        self._ledger = ledger
        self._codecs = settings.codecs()
        self._replicas = replicas
        self._observer = observer
        self._network = network
        self._costs = costs
        self._clock = clock
        self._after_turn = after_turn
        self._latest = [(0.0, 0.0)] * size  # seconds that a worker's latest exchange took, and kept its processor busy
        self._present: list[int] = []  # workers that take part, in order of rank
        self._turn = 0
        self._latest_deltas = -math.inf  # when the latest turn with deltas had its headers
        self._turn_open = False
        self._awaited: set[int] = set()  # who has not let go of the open turn yet
        self._held_by: set[int] = set()  # who holds it open for its push
        self._headers: dict[int, Header] = {}  # of this turn

    # ---- what training threads call ---------------------------------------------------------------------------------

    def join(self, worker: int) -> tuple[int, ...]:
        """A worker begins to take part; returns the versions of the fragments that it begins from."""
        insort(self._present, worker)
        self._mailboxes[worker].flags = Flag.NONE
        return self._versions

    @property
    def _versions(self) -> tuple[int, ...]:
        return tuple(state.version for state in self._state.fragments)

    def leave(self, worker: int) -> None:
        """A worker takes part no longer. What it has pushed is lost, unless a header has told of it."""
        self._present.remove(worker)
        mailbox = self._mailboxes[worker]
        mailbox.flags, mailbox.speed, mailbox.push = Flag.FINAL, 0.0, None
        if worker not in self._headers:
            mailbox.pending = None
        self.announce(worker)

    def announce(self, worker: int) -> None:
        """There is news from a worker: it opens a turn, or holds one open no longer."""
        self._mailboxes[worker].news = True
        if not self._turn_open:
            self._turn_open = True
            self._clock.after(0.0, Phase.EXCHANGE, self._open_turn)
        else:
            self._release(worker, self._turn)

    def pushed(self, worker: int) -> None:
        """There is a push from a worker that trains on: it opens a turn, unless the one before is too short ago."""
        if self._turn_open:
            self._release(worker, self._turn)
            return
        since = self._clock.now - self._latest_deltas
        wait = turn_interval(self.progress, self._settings) - since
        if wait > 0:
            self._clock.after(wait, Phase.EXCHANGE, self._open_for_push, worker, self._turn)
        else:
            self.announce(worker)

    def _open_for_push(self, worker: int, turn: int) -> None:
        if turn == self._turn and not self._turn_open and self._mailboxes[worker].push is not None:
            self.announce(worker)

    def wants_push(self, worker: int) -> bool:
        """Whether a turn is held open for a worker's push."""
        return worker in self._held_by

    # ---- a turn -----------------------------------------------------------------------------------------------------

    def _open_turn(self) -> None:
        """The bell rings: at once for the worker that opens the turn, a trip later for the others."""
        self._awaited = set(range(len(self._mailboxes)))
        trip = self._network.trip(self._present)
        present = set(self._present)
        for worker, mailbox in enumerate(self._mailboxes):
            if trip == 0 or mailbox.news or worker not in present:
                self._hear(worker, self._turn)
            else:
                self._clock.after(trip, Phase.EXCHANGE, self._hear, worker, self._turn)

    def _hear(self, worker: int, turn: int) -> None:
        """A worker has heard of the turn: it holds it open, if that is worth it for its push."""
        mailbox = self._mailboxes[worker]
        has_delta = mailbox.pending is not None or mailbox.push is not None
        if may_push(mailbox.flags, has_delta) and mailbox.hold_open_seconds > 0:
            self._held_by.add(worker)
            self._clock.after(mailbox.hold_open_seconds, Phase.EXCHANGE, self._release, worker, turn)
        else:
            self._let_go(worker)

    def _release(self, worker: int, turn: int) -> None:
        """A worker holds the turn open no longer, if it did."""
        if turn == self._turn and worker in self._held_by:
            self._held_by.discard(worker)
            self._let_go(worker)

    def _let_go(self, worker: int) -> None:
        self._awaited.discard(worker)
        if not self._settings.overlap:
            self._take(worker)
        if not self._awaited:
            ready = self._network.trip(self._present) if self._settings.overlap else 0.0
            self._clock.after(ready, Phase.EXCHANGE, self._take_all)

    def _take_all(self) -> None:
        for worker in range(len(self._mailboxes)):
            if worker not in self._headers:
                self._take(worker)
        self._clock.after(self._network.header_seconds(self._present), Phase.EXCHANGE, self._exchange_deltas)

    def _take(self, worker: int) -> None:
        """Write a worker's header, and take what it has pushed."""
        mailbox = self._mailboxes[worker]
        seconds, cost = self._latest[worker]
        header = Header(
            worker,
            self._turn,
            flags=mailbox.flags,
            steps=mailbox.steps,
            reserved=self._reserve(worker),
            speed=mailbox.speed,
            exchange_seconds=seconds,
            exchange_cost=cost,
        )
        mailbox.news = False
        finite = True
        if mailbox.push is not None:
            mailbox.pending, mailbox.push = mailbox.push, None
            finite = self._replicas.finite(worker)
        pushed = None if mailbox.pending is None else mailbox.pending.round
        self._headers[worker] = add_round(header, pushed, finite)

    def _reserve(self, worker: int) -> int:
        """Local steps that a worker keeps for the time of the turn."""
        mailbox, caps = self._mailboxes[worker], self.progress.caps
        if mailbox.reserve is None or caps is None:
            return 0
        mailbox.limit = max(mailbox.steps, min(mailbox.steps + mailbox.reserve, caps[worker]))
        return int(mailbox.limit) - mailbox.steps

    def _exchange_deltas(self) -> None:
        headers = [self._headers[worker] for worker in range(len(self._mailboxes))]
        groups = self._ledger.due(headers)
        senders = [worker for group in groups for worker in group.senders]
        if senders:
            self._latest_deltas = self._clock.now
        present = sorted({*self._present, *senders})
        costs = self._costs
        cost = len(groups) * costs.update_seconds + (costs.turn_seconds if senders else 0.0)
        codec = self._codecs[self._ledger.codec]
        sent = 0.0
        for fragment, of_fragment in groupby(groups, lambda group: group.fragment):
            sums = [group.senders for group in of_fragment]
            elements = costs.elements[fragment]
            if costs.sums:
                sent += sum(self._network.reduce_seconds(s, present, elements, codec) for s in sums)
            else:
                sent += self._network.gather_seconds([s for each in sums for s in each], present, elements, codec)
        self._count_bytes(groups, present, codec)
        for sender in senders:
            self._latest[sender] = (cost + sent, cost)
        self._clock.after(cost + sent, Phase.EXCHANGE, self._publish, headers, groups, codec)

    def _count_bytes(self, groups: Sequence[Group], present: Sequence[int], codec: Codec) -> None:
        """Count the bytes of a turn.

        Args:
            groups: the deltas that make up each sum.
            present: the workers that take part.
            codec: the codec of the turn.
        """
        told = HEADER_BYTES + (1 if self._settings.overlap else 0)
        for worker in present:
            self.bytes_sent[worker] += (len(present) - 1) * told
            self.bytes_received[worker] += (len(present) - 1) * told
            for group in groups:
                senders, elements = group.senders, self._costs.elements[group.fragment]
                if not senders:
                    continue
                if self._costs.sums:
                    sent, received = Network.reduce_bytes(senders, present, worker, elements, codec)
                else:
                    sent, received = Network.gather_bytes(senders, present, worker, elements, codec)
                self.bytes_sent[worker] += round(sent)
                self.bytes_received[worker] += round(received)

    def _publish(self, headers: list[Header], groups: list[Group], codec: Codec) -> None:
        for group in self._replicas.trade(groups, codec):
            self._observer.updated(self._clock.now, self._ledger.apply(group))
        applied = [delta.header for group in groups for delta in group.deltas]
        dropped = [header for header in headers if Flag.DROPPED in header.flags]
        self.progress = self._ledger.close_turn(headers, applied)
        if self._codecs[self.progress.codec] is not codec:
            self._latest = [(0.0, 0.0)] * len(self._mailboxes)  # exchanges take another time from now on
        settled = sorted(header.worker for header in applied + dropped)
        for mailbox in self._mailboxes:
            mailbox.limit = math.inf
        self._replicas.publish(settled)
        finished = []
        for worker in settled:
            mailbox = self._mailboxes[worker]
            assert mailbox.pending is not None
            finished.append(self._finished(worker, mailbox.pending))
            restart = Flag.DROPPED in headers[worker].flags
            mailbox.adoption = Adoption(mailbox.pending.round.fragment, self._versions, restart)
            mailbox.pending = None
        self._turn += 1
        self._turn_open = False
        self._headers = {}
        self._after_turn(finished)
        for worker, mailbox in enumerate(self._mailboxes):
            if mailbox.news and not self._turn_open:
                self.announce(worker)
        for worker, mailbox in enumerate(self._mailboxes):
            if mailbox.push is not None and not self._turn_open:
                self.pushed(worker)

    def _finished(self, worker: int, push: Push) -> FinishedRound:
        return FinishedRound(
            worker=worker,
            round=push.round.round,
            begin=push.begin,
            end=push.end,
            adopted=self._clock.now,
            local_steps=push.round.steps,
            all_steps=push.all_steps,
            loss=push.loss / max(1, push.round.steps),
        )

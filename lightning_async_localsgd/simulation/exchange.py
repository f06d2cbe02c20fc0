"""The virtual exchange: what the exchange threads of all workers do in a turn, under the virtual clock.

The decisions are those of a real run: ``protocol/turn.py`` says who may hold a turn open and what a header tells, and
the :class:`~lightning_async_localsgd.protocol.ledger.Ledger` says what becomes of the deltas.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_async_localsgd.protocol.header import HEADER_BYTES, Flag, Header
from lightning_async_localsgd.protocol.ledger import Ledger, LedgerState
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.protocol.turn import add_round, may_push
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.clock import Phase, VirtualClock
from lightning_async_localsgd.simulation.interfaces import FinishedRound, Observer, Replicas
from lightning_async_localsgd.simulation.mailbox import Adoption, Push, VirtualMailbox
from lightning_async_localsgd.simulation.network import Network

__all__ = ["DeltaCosts", "VirtualExchange"]


@dataclass(frozen=True)
class DeltaCosts:
    """What a delta takes of the network and of the exchange threads."""

    elements: int
    element_bytes: int
    """Bytes of an element on the wire."""
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
        self._replicas = replicas
        self._observer = observer
        self._network = network
        self._costs = costs
        self._clock = clock
        self._after_turn = after_turn
        self._latest = [(0.0, 0.0)] * size  # seconds that a worker's latest exchange took, and kept its processor busy
        self._present: list[int] = []  # workers that take part, in order of rank
        self._turn = 0
        self._turn_open = False
        self._awaited: set[int] = set()  # who has not let go of the open turn yet
        self._held_by: set[int] = set()  # who holds it open for its push
        self._headers: dict[int, Header] = {}  # of this turn

    # ---- what training threads call ---------------------------------------------------------------------------------

    def join(self, worker: int) -> int:
        """A worker begins to take part; returns the version of the global parameters that it begins from."""
        insort(self._present, worker)
        self._mailboxes[worker].flags = Flag.NONE
        self._state.begin_rounds([worker])
        return self._state.version

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
        if may_push(mailbox.flags, has_delta) and mailbox.patience > 0:
            self._held_by.add(worker)
            self._clock.after(mailbox.patience, Phase.EXCHANGE, self._release, worker, turn)
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

    def _exchange_deltas(self) -> None:
        headers = [self._headers[worker] for worker in range(len(self._mailboxes))]
        groups = self._ledger.due(headers)
        senders = [header.worker for group in groups for header in group]
        self._count_bytes(senders)
        present = sorted({*self._present, *senders})
        costs = self._costs
        cost = len(groups) * costs.update_seconds + (costs.turn_seconds if senders else 0.0)
        seconds = cost + self._network.delta_seconds(senders, present, costs.elements, costs.element_bytes)
        for sender in senders:
            self._latest[sender] = (seconds, cost)
        self._clock.after(seconds, Phase.EXCHANGE, self._publish, headers, groups)

    def _count_bytes(self, senders: Sequence[int]) -> None:
        told = HEADER_BYTES * (2 if self._settings.overlap else 1)
        delta = self._costs.elements * self._costs.element_bytes
        sending = set(senders)
        peers = len(self._present) - 1
        for worker in self._present:
            sends = worker in sending
            self.bytes_sent[worker] += peers * (told + delta * sends)
            self.bytes_received[worker] += peers * told + delta * (len(senders) - sends)

    def _publish(self, headers: list[Header], groups: list[list[Header]]) -> None:
        for group in self._replicas.trade(groups):
            self._observer.updated(self._clock.now, self._ledger.apply(group))
        applied = [header for group in groups for header in group]
        dropped = [header for header in headers if Flag.DROPPED in header.flags]
        self.progress = self._ledger.close_turn(headers, applied)
        settled = sorted(header.worker for header in applied + dropped)
        self._replicas.publish(settled)
        finished = []
        for worker in settled:
            mailbox = self._mailboxes[worker]
            assert mailbox.pending is not None
            finished.append(self._finished(worker, mailbox.pending))
            mailbox.pending = None
            mailbox.adoption = Adoption(self._state.version, restart=Flag.DROPPED in headers[worker].flags)
        self._turn += 1
        self._turn_open = False
        self._headers = {}
        self._after_turn(finished)
        for worker, mailbox in enumerate(self._mailboxes):
            if mailbox.news and not self._turn_open:
                self.announce(worker)

    def _finished(self, worker: int, push: Push) -> FinishedRound:
        return FinishedRound(
            worker=worker,
            round=push.round.round,
            begin=push.begin,
            end=push.end,
            adopted=self._clock.now,
            local_steps=push.round.steps,
            all_steps=push.all_steps,
            loss=push.loss / push.round.steps,
        )

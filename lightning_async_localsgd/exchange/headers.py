"""The headers of a turn: written, given to all workers, read and checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from lightning_async_localsgd.errors import PeerAbortedError, PeerLostError, ReplicaDivergedError
from lightning_async_localsgd.exchange.mailbox import Mailbox
from lightning_async_localsgd.exchange.transport import Transport
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.messages import Abort, Message

__all__ = ["HeaderExchange", "abort_reason"]

_READY = b"\0"
_ALIVE = Flag.DELTA | Flag.DROPPED | Flag.IDLE | Flag.FINAL | Flag.PAUSED
_VERSIONS_KEPT = 2  # a worker that trails is one turn behind
_T = TypeVar("_T")


class HeaderExchange:
    """Gives this worker's header to all and gathers theirs, turn by turn.

    A worker that owns no slice of the sums, because its link is slow, *trails*: while it still receives the sums of one
    turn, it answers the next one on the bell's thread, with a header that brings no delta. So the others go on, one
    turn ahead of it. It answers no turn after that before it has the sums, which bounds what is under way to it. Its
    early answer tells the version and checksum of its latest header, for its state is on the move.

    Args:
        transport: connections to the other workers.
        roster: who takes part.
        mailbox: where the training thread tells how it stands.
        timeout: seconds for which a worker that blocks this one may make no step.
        ready: whether all workers tell that they are ready before they write their headers (``overlap``).
        trails: whether this worker answers early.
        fragments: number of fragments of the model.
        shards: number of shards of the data; None: as many as workers.
    """

    def __init__(
        self,
        transport: Transport,
        roster: Roster,
        mailbox: Mailbox,
        timeout: float,
        ready: bool,
        trails: bool,
        fragments: int = 1,
        shards: int | None = None,
    ) -> None:
        self._transport = transport
        self._roster = roster
        self._mailbox = mailbox
        self._timeout = timeout
        self._ready = ready
        self._trails = trails
        self._fragments = fragments
        self._shards = roster.size if shards is None else shards
        self._steps = [-1] * roster.size
        self._advanced = [time.monotonic()] * roster.size
        self._checksums: dict[int, int] = {}  # of the latest two versions at which a header was written
        self._lock = threading.Lock()  # guards what follows, for the bell's thread
        self._rung = -1
        self._trading: int | None = None  # the turn whose sums are on their way
        self._latest = Header(roster.number, -1)
        self._early: Header | None = None
        self._over = False  # no turn follows

    # ---- early answers ----------------------------------------------------------------------------------------------

    def hear(self, turn: int) -> None:
        """Called by the bell's listener: some worker opened ``turn``."""
        with self._lock:
            self._rung = turn
            self._answer_early()

    @contextmanager
    def trading(self, turn: int) -> Iterator[None]:
        """While the sums of ``turn`` are on their way: the next turn may be answered early."""
        with self._lock:
            self._trading = turn
            self._answer_early()
        try:
            yield
        finally:
            with self._lock:
                self._trading = None

    def _answer_early(self) -> None:
        due = self._trading is not None and self._rung > self._trading
        if not (due and self._trails and self._early is None) or self._over:
            return
        latest, live = self._latest, self._mailbox.take_live()
        self._early = Header(
            worker=latest.worker,
            turn=latest.turn + 1,
            version=latest.version,
            checksum=latest.checksum,
            exchange_seconds=latest.exchange_seconds,
            exchange_cost=latest.exchange_cost,
            flags=live.flags,
            steps=live.steps,
            reserved=live.reserved,
            speed=live.speed,
            message=live.message,
        )
        with suppress(PeerLostError):  # the exchange thread will hear of it, too
            if self._ready:
                self._transport.tell(_READY)
            for data in self._early.pack():
                self._transport.tell(data)

    @property
    def answered(self) -> bool:
        """Whether the header of the turn that begins has been given already, without a delta."""
        return self._early is not None

    def get_ready(self) -> None:
        """Wait until every worker is ready to write its header, if that is asked for."""
        if self._ready:
            self._all_of(_READY)

    def exchange(self, header: Header) -> list[Header]:
        """Give this worker's header to all, unless the turn was answered early, and gather those of all, by rank.

        Raises:
            PeerAbortedError: if a worker leaves because of an error.
            PeerLostError: if a worker is gone, silent, out of step, makes no steps or sends something else.
            ReplicaDivergedError: if a worker holds other global parameters.
        """
        early = self._early
        own, message = (early or header).pack()
        self._keep_checksum(header)
        packed = self._all_of(own)
        sizes = [self._read(worker, Header.message_bytes, data) for worker, data in enumerate(packed)]
        messages = [b""] * len(packed)
        if any(sizes):
            exchange = self._transport.hear_some if early else self._transport.gather_some
            messages = exchange(message, sizes)
        headers = [
            self._read(worker, Header.unpack, data, text)
            for worker, (data, text) in enumerate(zip(packed, messages, strict=True))
        ]
        for worker, other in enumerate(headers):
            self._check(worker, other, header)
        with self._lock:
            self._latest, self._early = header, None
            self._over = all(Flag.FINAL in other.flags for other in headers)
        return headers

    def _all_of(self, own: bytes) -> list[bytes]:
        return self._transport.hear(own) if self.answered else self._transport.gather(own)

    def _read(self, worker: int, read: Callable[..., _T], *data: bytes) -> _T:
        try:
            return read(*data)
        except ValueError as error:
            raise PeerLostError(
                f"{self._roster.name(worker)} sent something that is not a header: {error}. "
                "Check that all workers run the same version of this library."
            ) from error

    def _keep_checksum(self, header: Header) -> None:
        self._checksums[header.version] = header.checksum
        for version in sorted(self._checksums)[:-_VERSIONS_KEPT]:
            del self._checksums[version]

    def _check(self, worker: int, other: Header, own: Header) -> None:
        name = self._roster.name(worker)
        if Flag.ABORT in other.flags and worker != self._roster.rank:
            raise PeerAbortedError(abort_reason(other.message))
        in_range = other.shard < self._shards and other.fragment < self._fragments
        if (other.worker, other.turn) != (self._roster.numbers[worker], own.turn) or not in_range:
            raise PeerLostError(f"{name} is out of step: it is in turn {other.turn}, this worker in {own.turn}.")
        if self._checksums.get(other.version) != other.checksum:
            raise ReplicaDivergedError(
                f"{name} holds other global parameters than {self._roster.name(self._roster.rank)} at version "
                f"{other.version}. This is a bug, an outer optimizer that is not deterministic, or faulty memory; "
                "restart from the last checkpoint."
            )
        now = time.monotonic()
        if other.steps > self._steps[worker] or other.flags & _ALIVE:
            self._advanced[worker] = now
        elif self._mailbox.waiting and now - self._advanced[worker] > self._timeout:
            raise PeerLostError(
                f"{name} has made no step for {now - self._advanced[worker]:.0f} s, though its exchange thread "
                "answers: its training hangs. Look at its data loading; raise `timeout` if a step may take that long."
            )
        self._steps[worker] = other.steps


def abort_reason(message: Message | None) -> str:
    """What a worker that leaves says why."""
    return message.reason if isinstance(message, Abort) else "A worker stopped and gave no reason."

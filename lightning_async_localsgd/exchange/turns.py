"""The turns of the exchange: headers are gathered, deltas traded and applied in rank order.

A turn goes through these states, alike on every worker:

1. *asleep* until the training thread has news or the bell tells that another worker opened the turn;
2. *grace*: a worker that is about to push holds the turn open until it has, for as long as it said it is worth. Those
   who train on meanwhile (``overlap``) add the steps they make to their delta, until nobody holds the turn any more;
3. *headers*: every worker gives its header to every other;
4. *deltas*, if the quorum is met: each worker that has one sends it, and all apply the sum. A worker with a slow link
   answers the next turn while it still receives this one's (``headers.py``);
5. *publish*: shared progress, and to a worker whose delta was applied its new global parameters.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from lightning_async_localsgd.errors import PeerAbortedError
from lightning_async_localsgd.exchange.accelerator import synchronize
from lightning_async_localsgd.exchange.headers import HeaderExchange, abort_reason
from lightning_async_localsgd.exchange.mailbox import Adoption, Live, Mailbox, Push
from lightning_async_localsgd.exchange.trade import Trade
from lightning_async_localsgd.exchange.transport import Transport
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.outer import GlobalModel, GlobalState, Unsendable, write_delta
from lightning_async_localsgd.protocol.accounts import Accounts
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.ledger import Group, Ledger
from lightning_async_localsgd.protocol.messages import Message
from lightning_async_localsgd.protocol.progress import OuterUpdate
from lightning_async_localsgd.protocol.turn import add_round, turn_interval
from lightning_async_localsgd.settings import Settings

__all__ = ["Generation", "RingsAll", "Turns"]

_HEARTBEAT = 5.0  # seconds
_SAMPLE = 1 << 16  # elements, about
_RECENT = 5  # exchanges whose median is told
_TRAILING_TURNS = 4
"""An exchange of a worker that trails may take two rounds, where another's has to be over in half a round. So it tells
that part of the time: codec, H and rate of turns, which are derived from it, then fit both."""


class _Exchange(NamedTuple):
    """What an exchange of a delta of this worker's has taken, in seconds."""

    seconds: float
    """From all headers to the new global parameters."""
    cost: float
    """Of this thread's processor."""


class RingsAll(Protocol):
    """A bell that all workers of a generation hear."""

    def ring(self, turn: int) -> None:
        """Open ``turn``. Ringing twice is the same as once."""

    def all_have_heard(self, turn: int) -> None:
        """All headers of ``turn`` are here."""


@dataclass(frozen=True)
class Generation:
    """The workers that exchange with each other, and what connects them: those of a run, or of a part of it."""

    roster: Roster
    transport: Transport
    trades: Sequence[Trade]
    """Bring sums of deltas into the pseudo-gradient of the global state, one for each of its fragments."""
    bell: RingsAll


class Turns:
    """Takes one turn after the other, on the exchange thread, which owns the global state meanwhile.

    Args:
        mailbox: where to meet the training thread.
        state: the global state, equal on all workers.
        settings: settings of the run.
        budget: how many local steps the run has.
        accounts: of workers that come and go; None: all are there from the beginning to the end.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        state: GlobalModel,
        settings: Settings,
        budget: Budget,
        accounts: Accounts | None = None,
    ) -> None:
        self._mailbox = mailbox
        self._state = state
        self._settings = settings
        self._codecs = settings.codecs()
        choice = settings.codec_choice(state.flat.numel() // settings.fragments)
        self._ledger = Ledger(state, settings, budget, mailbox.progress, choice, accounts)
        self._accounts = accounts
        self._largest = settings.largest
        self._timeout = settings.timeout.total_seconds()
        self._turn = 0
        self._opened = -math.inf  # the time of the latest turn that applied deltas
        self._pending: Push | None = None
        self._unsendable = Unsendable()  # of the pending push
        self._is_transformed = False  # by the sender's transformations
        self._told: Message | None = None  # the message of this worker in the turn of now
        self._messages: list[tuple[int, Message]] = []  # of the latest turn that was closed
        self._closed = 0  # turns
        self._exchanges: deque[_Exchange] = deque(maxlen=_RECENT)

    @property
    def pending(self) -> Push | None:
        """The delta that waits for a quorum: it has taken its part of ``base``. To be read during a cut only."""
        return self._pending

    def enter(self, generation: Generation) -> None:
        """Take the turns that follow with these workers."""
        self._roster, self._transport = generation.roster, generation.transport
        self._trades, self._bell = generation.trades, generation.bell
        self._trails = self._roster.rank in self._trades[0].trailing  # all have the same
        self._headers = HeaderExchange(
            self._transport,
            self._roster,
            self._mailbox,
            self._timeout,
            self._settings.overlap,
            self._trails,
            self._settings.fragments,
            None if self._accounts is None else len(self._ledger.progress.shard_samples),
        )

    def hear(self, turn: int) -> None:
        """Some worker has opened ``turn``. Called on the bell's thread."""
        self._mailbox.hear(turn)
        self._headers.hear(turn)

    def wait(self) -> None:
        """Sleep until the next turn is due, or some worker has opened it."""
        self._mailbox.wait_for_release()
        open_from = self._opened + turn_interval(self._mailbox.progress, self._settings)
        if self._mailbox.wait_for_turn(self._turn, min(_HEARTBEAT, self._timeout / 4), open_from):
            self._bell.ring(self._turn)

    def take(self) -> bool:
        """Take the turn; returns whether it was the last."""
        if self._pending is None and not self._headers.answered:
            self._mailbox.wait_for_push()
        self._headers.get_ready()
        busy_since = time.thread_time()
        header = self._header(self._take())
        with record_function("async_localsgd::headers"):
            headers = self._headers.exchange(header)
        self._transport.end_turn()
        began = time.monotonic()
        own = headers[self._roster.rank]
        if self._accounts is not None:
            headers = self._accounts.with_absent(headers)
        if Flag.ABORT in own.flags:
            raise PeerAbortedError(abort_reason(own.message))
        updates, applied = self._apply(headers)
        if applied:
            self._opened = began
        codec = self._ledger.codec
        with self._mailbox.global_state():
            progress = self._ledger.close_turn(
                headers, applied, self._transport.bytes_sent, self._transport.bytes_received
            )
        if progress.codec != codec:
            self._exchanges.clear()  # others take another time
        adoption = self._adopt(applied)
        if adoption is not None and progress.codec == codec:
            seconds = (time.monotonic() - began) / (_TRAILING_TURNS if self._trails else 1)
            self._exchanges.append(_Exchange(seconds, time.thread_time() - busy_since))
        self._bell.all_have_heard(self._turn)
        self._turn += 1
        messages = [(header.worker, header.message) for header in headers if header.message is not None]
        self._told, self._messages, self._closed = None, messages, self._closed + 1
        self._mailbox.publish(progress, updates, messages, adoption)
        return progress.over

    # ---- headers ----------------------------------------------------------------------------------------------------

    def _take(self) -> Live:
        """How the training thread stands, with the push to bring to this turn; nothing if the turn is answered."""
        if self._headers.answered:
            return Live(0, 0, 0.0, Flag.NONE, None)
        live, push = self._mailbox.take()
        self._told = live.message
        if push is not None:
            self._unsendable = self._prepare(push)
            self._pending = push
            self._is_transformed = False
        return live

    @torch.no_grad()
    def _prepare(self, push: Push) -> Unsendable:
        """Turn the fragment's part of ``push.base`` into the delta; returns what of it cannot be sent."""
        with record_function("async_localsgd::encode"):
            push.ready()
            state, base = self._pushed(push)
            buffers = state.flat[state.layout.parameter_numel :]
            return write_delta(state, base, push.snapshot, buffers, base, self._largest)

    def _pushed(self, push: Push) -> tuple[GlobalState, Tensor]:
        """The state of the pushed fragment, and its part of the base."""
        state = self._state.fragments[push.round.fragment]
        return state, push.base[state.layout.span]

    def _header(self, live: Live) -> Header:
        header = Header(
            worker=self._roster.number,
            turn=self._turn,
            version=self._state.version,
            checksum=self._state.checksum(),
            exchange_seconds=median(e.seconds for e in self._exchanges) if self._exchanges else 0.0,
            exchange_cost=median(e.cost for e in self._exchanges) if self._exchanges else 0.0,
            flags=live.flags,
            steps=live.steps,
            reserved=live.reserved,
            speed=live.speed,
            message=live.message,
        )
        pushed = None if self._pending is None else self._pending.round
        return add_round(header, pushed, finite=not self._unsendable.parameters)

    # ---- deltas -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply(self, headers: list[Header]) -> tuple[list[OuterUpdate], list[Header]]:
        """Apply this turn's deltas, if enough are there; returns the outer updates, and whose deltas were applied."""
        updates: list[OuterUpdate] = []
        groups = self._ledger.due(headers)
        self._transform_own(groups)
        with self._headers.trading(self._turn):
            for group in self._traded(groups):
                state, senders = self._state.fragments[group.fragment], group.senders
                measures = state.measure(len(senders)) if senders and self._mailbox.measure_updates else (None, None)
                self._watch_direction(state, senders)
                with record_function("async_localsgd::apply"), self._mailbox.global_state():
                    updates += self._ledger.apply(group, *measures)
                    synchronize(self._state.flat.device)  # the training thread may read it on another stream
        return updates, [delta.header for group in groups for delta in group.deltas]

    def _traded(self, groups: list[Group]) -> Iterator[Group]:
        """One group after the other, each once the sum of its deltas is in the pseudo-gradient of its fragment."""
        pushed = None if self._pending is None else self._pending.round.fragment
        codec = self._codecs[self._ledger.codec]
        for fragment, of_fragment in groupby(groups, lambda group: group.fragment):
            own = self._pushed(self._pending)[1] if self._pending is not None and fragment == pushed else None
            traded = list(of_fragment)
            sums = self._trades[fragment].sums([self._roster.ranks_of(group.senders) for group in traded], own, codec)
            for group, _ in zip(traded, sums, strict=True):
                yield group

    def _transform_own(self, groups: list[Group]) -> None:
        """Apply to this worker's delta, if it is to be sent, the transformations that are a sender's."""
        for group in groups:
            for _, arrival, accepted in group.deltas:
                if accepted and arrival.worker == self._roster.number:
                    assert self._pending is not None
                    if self._is_transformed:  # in a turn that was abandoned
                        return
                    self._is_transformed = True
                    state, delta = self._pushed(self._pending)
                    state.transform_delta(delta, arrival, self._pending.snapshot)

    def _watch_direction(self, state: GlobalState, senders: list[int]) -> None:
        """On the first worker: how its own delta lies to the momentum, by a sample of the elements, for the guard."""
        if self._roster.rank == 0 and self._roster.number in senders:
            every = max(1, state.layout.parameter_numel // _SAMPLE)
            self._mailbox.alignment = state.measure(len(senders), every)[1]

    def _adopt(self, applied: list[Header]) -> Adoption | None:
        """The new global parameters for this worker, if its own delta was among the applied, or could not be sent."""
        own = any(header.worker == self._roster.number for header in applied)
        if self._pending is None or not (own or self._unsendable.parameters):
            return None
        return self._settle(self._pending, self._unsendable)

    def _settle(self, push: Push, unsendable: Unsendable) -> Adoption:
        """The pending delta is settled: the new global parameters for this worker."""
        self._pending = None
        state, base = self._pushed(push)
        correction = push.snapshot
        base.copy_(state.flat)
        torch.sub(base, correction, out=correction)
        state.clear_holes(correction)
        if unsendable.parameters:  # the worker begins again, with all fragments
            push.base.copy_(self._state.flat)
        synchronize(base.device)
        versions = self._state.versions
        return Adoption(push.round.fragment, push.base, correction, sum(versions), versions, unsendable)

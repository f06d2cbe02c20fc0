"""The exchange thread: turn after turn, it gathers headers, trades deltas and applies them in rank order.

A turn goes through these states, alike on every worker:

1. *asleep* until the training thread has news or the bell tells that another worker opened the turn;
2. *grace*: a worker that is about to push holds the turn open until it has, for as long as it said it is worth. Those
   who train on meanwhile (``overlap``) add the steps they make to their delta, until nobody holds the turn any more;
3. *headers*: every worker gives its header to every other;
4. *deltas*, if the quorum is met: each worker that has one sends it, and all apply the sum. A worker with a slow link
   answers the next turn while it still receives this one's (``headers.py``);
5. *publish*: shared progress, and to a worker whose delta was applied its new global parameters.

A worker that dies in 1 is noticed in the next turn's 3; in 2 to 4, by whoever waits for it. Without news a turn opens
every few seconds, for that alone. Who notices ends its own training first; then it looks for the first cause in the
store, or writes down its own there; then it closes its connections. So all name the same worker, and not the messenger.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import groupby
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import Store
from torch.profiler import record_function

from lightning_async_localsgd.errors import PeerAbortedError, PeerLostError
from lightning_async_localsgd.exchange.accelerator import synchronize
from lightning_async_localsgd.exchange.causes import LOOK_UP, Causes
from lightning_async_localsgd.exchange.doorbell import Bell
from lightning_async_localsgd.exchange.headers import HeaderExchange, abort_reason
from lightning_async_localsgd.exchange.mailbox import Adoption, Live, Mailbox, Push
from lightning_async_localsgd.exchange.trade import Trade
from lightning_async_localsgd.exchange.transport import Transport
from lightning_async_localsgd.membership import JobStore, Roster
from lightning_async_localsgd.outer import GlobalModel, GlobalState, Unsendable, write_delta
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import Flag, Header
from lightning_async_localsgd.protocol.ledger import Group, Ledger
from lightning_async_localsgd.protocol.progress import OuterUpdate
from lightning_async_localsgd.protocol.turn import add_round, turn_interval
from lightning_async_localsgd.settings import Settings

__all__ = ["ExchangeThread"]

_GOODBYE = timedelta(seconds=10)
_LAST_WORDS = timedelta(seconds=2)
_A_MOMENT = 2.0  # seconds
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


class ExchangeThread:
    """Owns the global state, the transport and the bell while it runs; meets the training thread in ``mailbox`` only.

    Args:
        mailbox: where to meet the training thread.
        state: the global state, equal on all workers.
        trades: bring sums of deltas into the pseudo-gradient of the global state, one for each of its fragments.
        transport: connections to the other workers.
        store: the run's part of the job's store.
        roster: who takes part.
        settings: settings of the run.
        budget: how many local steps the run has.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        state: GlobalModel,
        trades: Sequence[Trade],
        transport: Transport,
        store: Store,
        roster: Roster,
        settings: Settings,
        budget: Budget,
    ) -> None:
        self._mailbox = mailbox
        self._state = state
        self._trades = trades
        self._transport = transport
        self._store = JobStore(store, settings.timeout)
        self._causes = Causes(store, roster, settings.timeout)
        self._roster = roster
        self._settings = settings
        self._codecs = settings.codecs()
        choice = settings.codec_choice(state.flat.numel() // settings.fragments)
        self._ledger = Ledger(state, settings, budget, mailbox.progress, choice)
        self._largest = settings.largest
        self._timeout = settings.timeout.total_seconds()
        self._turn = 0
        self._opened = -math.inf  # the time of the latest turn that applied deltas
        self._pending: Push | None = None
        self._unsendable = Unsendable()  # of the pending push
        self._trails = roster.rank in trades[0].trailing  # all have the same
        self._headers = HeaderExchange(
            transport, roster, mailbox, self._timeout, settings.overlap, self._trails, settings.fragments
        )
        self._exchanges: deque[_Exchange] = deque(maxlen=_RECENT)
        self._leaving = False  # this worker's own training has failed
        self._bell = Bell(self._store, self._on_ring, self._on_store_lost)
        self._thread = threading.Thread(target=self._run, name="async-localsgd-exchange", daemon=True)

    @property
    def pending(self) -> Push | None:
        """The delta that waits for a quorum: it has taken its part of ``base``. To be read during a cut only."""
        return self._pending

    def start(self) -> None:
        """Begin with the first turn."""
        atexit.register(self._end)
        self._bell.start()
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the thread to end."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def abort(self, error: BaseException) -> None:
        """Leave because of the training thread's ``error``, after telling the others.

        Between two turns, and in those that take no time, the next header tells them. Whoever is in the middle of a
        long transfer learns by its end, and finds the reason in the store.

        Args:
            error: of this worker's own; one that the exchange has raised is known to the others.
        """
        if self._mailbox.failed or not self._thread.is_alive():
            self.join(LOOK_UP)
            return
        self._leaving = True
        stopped = self._causes.stopped(error)
        told = Causes(self._store.native, self._roster, self._settings.timeout)  # for this thread
        told.first(stopped)
        self._mailbox.abort(str(stopped))
        self._end()

    def _end(self) -> None:
        """End the thread, within a few seconds.

        A thread that is still inside gloo when the interpreter ends would take the process down by a signal.
        """
        self._thread.join(_A_MOMENT)
        if self._thread.is_alive():
            self._transport.interrupt()
            self._thread.join(LOOK_UP)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._take_turn():
                pass
            self._transport.end_turn(keep=0)
            self._transport.let_trail(())
            self._leave(_GOODBYE)
        except BaseException as error:
            first = self._mailbox.fail(error)
            self._mailbox.explain(first if self._leaving else self._causes.first(first))
            self._transport.interrupt()
            self._transport.close()
            self._leave(_LAST_WORDS)
        finally:
            atexit.unregister(self._end)
            del self._bell  # it refers back to this object, which would outlive its run with all its tensors

    def _take_turn(self) -> bool:
        """One turn; returns whether it was the last."""
        self._mailbox.wait_for_release()
        open_from = self._opened + turn_interval(self._mailbox.progress, self._settings)
        if self._mailbox.wait_for_turn(self._turn, min(_HEARTBEAT, self._timeout / 4), open_from):
            self._bell.ring(self._turn)
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
        if not self._mailbox.wait_for_bell(self._turn, self._timeout):
            raise self._roster.store_lost(TimeoutError("the bell has not been heard"))
        if self._turn > 0 and self._roster.rank == 0:
            # All headers of this turn are here, so every listener has heard the one before it.
            self._bell.clear(self._turn - 1)
        self._turn += 1
        messages = [(header.worker, header.message) for header in headers if header.message is not None]
        self._mailbox.publish(progress, updates, messages, adoption)
        return progress.over

    def _leave(self, limit: timedelta) -> None:
        """Let go of the store; worker 0, who may host it, once every worker has (and has read the cause)."""
        self._bell.close()
        self._store.timeout = min(self._store.timeout, limit)
        with suppress(PeerLostError):  # whoever is gone by now has nothing more to read
            self._store.set(f"goodbye/{self._roster.rank}", "1")
            if self._roster.rank == 0:
                goodbyes = [f"goodbye/{r}" for r in range(self._roster.size)]
                self._store.wait(goodbyes, min(limit, self._settings.timeout))

    # ---- headers ----------------------------------------------------------------------------------------------------

    def _take(self) -> Live:
        """How the training thread stands, with the push to bring to this turn; nothing if the turn is answered."""
        if self._headers.answered:
            return Live(0, 0, 0.0, Flag.NONE, None)
        live, push = self._mailbox.take()
        if push is not None:
            self._unsendable = self._prepare(push)
            self._pending = push
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
            worker=self._roster.rank,
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
            sums = self._trades[fragment].sums([group.senders for group in traded], own, codec)
            for group, _ in zip(traded, sums, strict=True):
                yield group

    def _transform_own(self, groups: list[Group]) -> None:
        """Apply to this worker's delta, if it is to be sent, the transformations that are a sender's."""
        for group in groups:
            for _, arrival, accepted in group.deltas:
                if accepted and arrival.worker == self._roster.rank:
                    assert self._pending is not None
                    state, delta = self._pushed(self._pending)
                    state.transform_delta(delta, arrival, self._pending.snapshot)

    def _watch_direction(self, state: GlobalState, senders: list[int]) -> None:
        """On worker 0: how its own delta lies to the momentum, by a sample of the elements; the guard looks at it."""
        if self._roster.rank == 0 and 0 in senders:
            every = max(1, state.layout.parameter_numel // _SAMPLE)
            self._mailbox.alignment = state.measure(len(senders), every)[1]

    def _adopt(self, applied: list[Header]) -> Adoption | None:
        """The new global parameters for this worker, if its own delta was among the applied, or could not be sent."""
        unsendable = self._unsendable
        if self._pending is None or (not unsendable.parameters and all(h.worker != self._roster.rank for h in applied)):
            return None
        push, self._pending = self._pending, None
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

    # ---- failures ---------------------------------------------------------------------------------------------------

    def _on_ring(self, turn: int) -> None:
        self._mailbox.hear(turn)
        self._headers.hear(turn)

    def _on_store_lost(self, error: Exception) -> None:
        self._mailbox.fail(self._roster.store_lost(error))
        self._transport.interrupt()  # this worker may be waiting for others in vain

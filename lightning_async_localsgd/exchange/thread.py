"""The exchange thread of a run whose workers are those it began with: it takes turn after turn, until one is lost.

A worker that dies while all are asleep is noticed in the next turn's headers; in a turn, by whoever waits for it.
Without news a turn opens every few seconds, for that alone. Who notices ends its own training first; then it looks for
the first cause in the store, or writes down its own there; then it closes its connections. So all name the same worker,
and not the messenger.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

from torch.distributed import Store

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.exchange.causes import LOOK_UP, Causes
from lightning_async_localsgd.exchange.doorbell import Bell
from lightning_async_localsgd.exchange.mailbox import Mailbox, Push
from lightning_async_localsgd.exchange.trade import Trade
from lightning_async_localsgd.exchange.transport import Transport
from lightning_async_localsgd.exchange.turns import Generation, Turns
from lightning_async_localsgd.membership import JobStore, Roster
from lightning_async_localsgd.outer import GlobalModel
from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.settings import Settings

__all__ = ["Exchange", "ExchangeThread"]

_GOODBYE = timedelta(seconds=10)
_LAST_WORDS = timedelta(seconds=2)
_A_MOMENT = 2.0  # seconds


class Exchange(Protocol):
    """What the training thread knows of the exchange, but for the mailbox."""

    @property
    def pending(self) -> Push | None:
        """The delta that waits for a quorum: it has taken its part of ``base``. To be read during a cut only."""

    def start(self) -> None:
        """Begin with the first turn."""

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the thread to end."""

    def abort(self, error: BaseException) -> None:
        """Leave because of the training thread's ``error``."""


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
        self._transport = transport
        self._store = JobStore(store, settings.timeout)
        self._causes = Causes(store, roster, settings.timeout)
        self._roster = roster
        self._settings = settings
        self._turns = Turns(mailbox, state, settings, budget)
        self._bell = Bell(self._store, self._turns.hear, self._on_store_lost)
        self._turns.enter(Generation(roster, transport, trades, self))
        self._leaving = False  # this worker's own training has failed
        self._thread = threading.Thread(target=self._run, name="async-localsgd-exchange", daemon=True)

    @property
    def pending(self) -> Push | None:
        """The delta that waits for a quorum: it has taken its part of ``base``. To be read during a cut only."""
        return self._turns.pending

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
            over = False
            while not over:
                self._turns.wait()
                over = self._turns.take()
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

    def _leave(self, limit: timedelta) -> None:
        """Let go of the store; worker 0, who may host it, once every worker has (and has read the cause)."""
        self._bell.close()
        self._store.timeout = min(self._store.timeout, limit)
        with suppress(PeerLostError):  # whoever is gone by now has nothing more to read
            self._store.set(f"goodbye/{self._roster.rank}", "1")
            if self._roster.rank == 0:
                goodbyes = [f"goodbye/{r}" for r in range(self._roster.size)]
                self._store.wait(goodbyes, min(limit, self._settings.timeout))

    # ---- the bell -------------------------------------------------------------------------------------------------

    def ring(self, turn: int) -> None:
        """See :class:`RingsAll`."""
        self._bell.ring(turn)

    def all_have_heard(self, turn: int) -> None:
        """See :class:`RingsAll`: whoever sent a header has heard of the turn before, which the store can forget."""
        if not self._mailbox.wait_for_bell(turn, self._settings.timeout.total_seconds()):
            raise self._roster.store_lost(TimeoutError("the bell has not been heard"))
        if turn > 0 and self._roster.rank == 0:
            self._bell.clear(turn - 1)

    # ---- failures ---------------------------------------------------------------------------------------------------

    def _on_store_lost(self, error: Exception) -> None:
        self._mailbox.fail(self._roster.store_lost(error))
        self._transport.interrupt()  # this worker may be waiting for others in vain

"""The exchange thread of a run whose workers come and go.

It goes through *views* of the membership. For each it connects to the other members, makes sure that all hold the same,
and takes turns with them until the view changes:

- A member is lost: its connections end, or the Lighthouse no longer hears of it. The turn is abandoned; nobody has lost
  more than that turn. All ask for the next view.
- Somebody comes: between two turns all go over to the next view. Who is still in a turn finishes it, or abandons it.
- No view has this worker in it, because it sees too few others or the Lighthouse does not: its training goes on until
  it needs the outcome of a push, and it waits for a view as long as ``timeout``.

Only the members of a view, all of them, can take a turn. So two halves that do not see each other never both go on.
"""

from __future__ import annotations

import atexit
import threading
import time
from contextlib import suppress
from datetime import timedelta

from lightning_async_localsgd.errors import PeerAbortedError, PeerLostError, ReplicaDivergedError
from lightning_async_localsgd.exchange.elastic_turns import ElasticTurns
from lightning_async_localsgd.exchange.mailbox import Mailbox, Push
from lightning_async_localsgd.exchange.mesh import Mesh, UnreachableError
from lightning_async_localsgd.exchange.tcp import TcpTransport
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.membership.elastic import ElasticMembership, Lighthouse, new_incarnation
from lightning_async_localsgd.protocol.members import Member, View

__all__ = ["ElasticExchange"]

_FORM = 3.0  # seconds for connecting to members of a view
_LOOK = 1.0  # seconds between two looks whether there is a view
_NOTICE = 0.5  # seconds for the membership to tell why a member is lost
_A_MOMENT = 2.0  # seconds


class ElasticExchange:
    """Owns the global state while it runs; meets the training thread in ``mailbox`` only.

    Args:
        lighthouse: where the workers of the job find each other.
        name: the name of this worker.
        address: the address at which the others reach this process.
        mailbox: where to meet the training thread.
        turns: takes the turns.
        timeout: how long a worker that sees no others waits, and a message of one that is there.
    """

    def __init__(
        self,
        lighthouse: Lighthouse,
        name: str,
        address: str,
        mailbox: Mailbox,
        turns: ElasticTurns,
        timeout: timedelta,
    ) -> None:
        self.turns = turns
        self._mailbox = mailbox
        self._timeout = timeout
        self._mesh = Mesh(lighthouse.proof)
        member = Member(name, new_incarnation(), address, self._mesh.port)
        self._membership = ElasticMembership(lighthouse, member, lambda: self.turns.position, self._on_change)
        self._view: View | None = None  # in which this worker exchanges
        self._failed: View | None = None
        self._transport: TcpTransport | None = None
        self._bytes = (0, 0)  # sent and received in the views before
        self._leaving = False
        self._thread = threading.Thread(target=self._run, name="async-localsgd-exchange", daemon=True)

    @property
    def pending(self) -> Push | None:
        """See :attr:`Turns.pending`."""
        return self.turns.pending

    # ---- the training thread's side ---------------------------------------------------------------------------------

    def come(self) -> None:
        """Find the others and take over what they hold, or begin a run with them.

        Raises:
            PeerLostError: if that takes longer than the timeout.
            WorkerMismatchError: if this worker was started differently.
        """
        self._membership.start()
        try:
            while not self._form():
                pass
        except BaseException:
            self._end()
            raise

    def start(self) -> None:
        """Begin with the turns."""
        atexit.register(self._stop)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the thread to end."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def leave(self) -> None:
        """Take no further turn. What is not applied by now is lost."""
        self._stop()

    def abort(self, error: BaseException) -> None:
        """Leave because of the training thread's ``error``; the others go on."""
        self._stop()

    def _stop(self) -> None:
        self._leaving = True
        self._membership.leave()
        self._mailbox.fail(PeerLostError("This worker has left the run."))
        if self._transport is not None:
            self._transport.interrupt()
        if self._thread.is_alive():
            self.join(_A_MOMENT)
        else:
            self._end()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._exchange():
                while not self._form():
                    pass
        except BaseException as error:
            self._mailbox.explain(self._mailbox.fail(error))
        finally:
            atexit.unregister(self._stop)
            self._end()

    def _end(self) -> None:
        self._membership.leave()
        if self._transport is not None:
            self._transport.close()
        self._mesh.close()

    def _exchange(self) -> bool:
        """Take turns in the view of now, until it changes (False) or the run is over."""
        assert self._view is not None and self._transport is not None
        over = False
        try:
            while not over:
                if not self._is_outdated(self._view):
                    self.turns.wait()
                if self._is_outdated(self._view):
                    break
                over = self.turns.take()
            if over:
                self._transport.end_turn(keep=0)
                self._transport.gather(b"\0")  # all have closed the last turn, too
        except (PeerLostError, PeerAbortedError, ReplicaDivergedError):
            over = False
            self._lose(self._view)
        if not over:
            self._disconnect()
        return over

    def _disconnect(self) -> None:
        """Give up the connections of the view that was."""
        if self._transport is not None:
            self._bytes = self._transport.bytes_sent, self._transport.bytes_received
            self._transport.close()
            self._transport = None

    def _is_outdated(self, view: View) -> bool:
        """Whether the view is no longer that of now."""
        now = self._membership.view
        return self._leaving or now is None or now.key != view.key

    def _lose(self, view: View) -> None:
        """A member of the view is lost, or has gone over to the next one already."""
        if self._leaving:
            raise PeerLostError("This worker has left the run.")
        if self._membership.wait(view, _NOTICE) is None:
            self._membership.reject(view)
        self._failed = view

    def _form(self) -> bool:
        """Go over to the view of now, when there is one; returns whether that has worked."""
        view = self._await_view()
        rank = view.rank_of(self._membership.member.incarnation)
        assert rank is not None
        hosts = [member.host for member in view.members]
        roster = Roster(rank, hosts, names=[member.name for member in view.members])
        try:
            connections = self._mesh.connect(view, rank, _FORM, lambda: not self._is_outdated(view))
            self._transport = TcpTransport(self._mesh, connections, roster, self._timeout, self._on_control)
            self._transport.bytes_sent, self._transport.bytes_received = self._bytes
            self._view = view
            if self._is_outdated(view):
                raise PeerLostError("The view has changed.")
            self.turns.meet(view, rank, roster, self._transport, self)
        except UnreachableError as error:
            self._membership.reject(view, error.members)
            self._failed = view
            return False
        except PeerLostError:
            self._disconnect()
            self._lose(view)
            return False
        self.turns.begin_at_once()
        return True

    def _await_view(self) -> View:
        end = time.monotonic() + self._timeout.total_seconds()
        while time.monotonic() < end:
            if self._leaving:
                break
            view = self._membership.wait(self._failed, _LOOK)
            if view is not None:
                return view
        trouble = self._membership.trouble
        why = f"it says: {trouble}" if trouble else "fewer than `min_workers` are there, or this one cannot reach them"
        raise PeerLostError(
            f"The Lighthouse let this worker take part in no run for {self._timeout.total_seconds():g} s: {why}. Look "
            "whether it runs, at this address, and whether the other workers have the same job name and token."
        )

    # ---- called on other threads ------------------------------------------------------------------------------------

    def _on_change(self) -> None:
        """The view of the membership has changed."""
        view, current, transport = self._membership.view, self._view, self._transport
        if current is None or transport is None:
            return
        members = set(view.members) if view is not None else set()
        if members.issuperset(current.members) and view is not None and view.attempt == current.attempt:
            self.turns.begin_at_once()  # somebody has come: at the end of the turn
        else:
            transport.interrupt()

    def _on_control(self, rank: int, data: bytes) -> None:
        with suppress(ValueError):
            kind, turn = data.decode().split()
            if kind == "ring" and int(turn) <= self.turns.position[0] + 1:  # nobody can be further
                self.turns.hear(int(turn))

    # ---- the bell ---------------------------------------------------------------------------------------------------

    def ring(self, turn: int) -> None:
        """See :class:`RingsAll`."""
        assert self._transport is not None
        self.turns.hear(turn)
        self._transport.tell_control(f"ring {turn}".encode())

    def all_have_heard(self, turn: int) -> None:
        """See :class:`RingsAll`: there is nothing to forget."""

"""Transport: bytes between workers, straight from each worker to each other one; over gloo."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from enum import IntEnum
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.membership.address import INTERFACE_VARIABLE, make_gloo_group
from lightning_async_localsgd.membership.sockets import recorded_sockets

__all__ = ["Channel", "GlooTransport", "Messages", "Transport", "Wait"]

Wait = Callable[[], None]
"""A function that waits until a transfer is complete.

Raises:
    PeerLostError: if the peer is gone, or has not answered within the timeout.
"""


class Channel(IntEnum):
    """A kind of message. Between two workers, messages of one channel arrive in the order in which they were sent."""

    HEADER = 1
    BROADCAST = 2
    RECEIPT = 3
    DELTA = 4
    SUM = 5


class Transport(Protocol):
    """Moves bytes between workers. Used by the exchange thread alone."""

    bytes_sent: int
    bytes_received: int

    def gather(self, data: bytes) -> list[bytes]:
        """Give ``data``, as long on every worker, to all and return that of all workers, by rank.

        Raises:
            PeerLostError: if a worker cannot be reached within the timeout.
        """

    def gather_some(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Give ``data`` to all workers and return that of all workers, by rank. Workers without data send nothing.

        Args:
            data: the bytes of this worker.
            sizes: the number of bytes of each worker, known to all.

        Raises:
            PeerLostError: if a worker cannot be reached within the timeout.
        """

    def tell(self, data: bytes) -> None:
        """Begin to give ``data`` to all workers, from any thread; :meth:`hear` or :meth:`hear_some` is to follow."""

    def hear(self, data: bytes) -> list[bytes]:
        """As :meth:`gather`, of what :meth:`tell` has given already."""

    def hear_some(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        """As :meth:`gather_some`, of what :meth:`tell` has given already."""

    def let_trail(self, peers: Iterable[int]) -> None:
        """From now on what is sent to these peers is waited for in :meth:`end_turn`."""

    def end_turn(self, keep: int = 1) -> None:
        """Wait for what was sent to trailing peers, but for that since the last ``keep`` calls and this one."""

    def send(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        """Begin to send ``wire`` (contiguous, on the CPU) to a peer, which must receive as many bytes.

        Several transfers can be under way at once. Until the wait returns, ``wire`` belongs to the transport; if the
        peer trails, for longer: the wait returns at once, and ``wire`` is not to be changed any more.
        """

    def receive(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        """Begin to receive ``wire`` (contiguous, on the CPU) from a peer. See :meth:`send`."""

    def broadcast(self, chunk: Tensor, root: int) -> Wait:
        """Begin to copy ``chunk`` (contiguous, on the CPU) from worker ``root`` into every other worker's ``chunk``.

        See :meth:`send`.
        """

    def acknowledge(self, root: int) -> Wait:
        """Begin to tell worker ``root`` that this worker has got this far; on ``root``, to hear it of all others."""

    def interrupt(self) -> None:
        """End the connections now, from any thread: all transfers, at either end, raise ``PeerLostError``."""

    def close(self) -> None:
        """Give up the connections."""


class Messages(ABC):
    """What a transport does with messages, whatever moves them.

    Every wait is a wait for one named peer, so that a failure says who: a collective algorithm would blame whichever
    neighbour its ring or tree happens to have.

    Args:
        roster: who takes part.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._peers = [r for r in range(roster.size) if r != roster.rank]
        self._trailing: frozenset[int] = frozenset()
        self._late: deque[list[Wait]] = deque([[]])  # what was sent to peers that trail, by turn
        self.bytes_sent = 0
        self.bytes_received = 0

    @abstractmethod
    def _begin_to_send(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        """Begin to send ``wire`` to a peer."""

    @abstractmethod
    def _begin_to_receive(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        """Begin to receive ``wire`` from a peer."""

    def gather(self, data: bytes) -> list[bytes]:
        """See :meth:`Transport.gather`."""
        return self.gather_some(data, [len(data)] * self._roster.size)

    def gather_some(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        """See :meth:`Transport.gather_some`."""
        sends = self._tell(data)
        heard = self.hear_some(data, sizes)
        _wait_for_all(sends)
        return heard

    def tell(self, data: bytes) -> None:
        """See :meth:`Transport.tell`."""
        self._late[-1].extend(self._tell(data))

    def _tell(self, data: bytes) -> list[Wait]:
        if not data:
            return []
        wire = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [self.send(wire, peer, Channel.HEADER) for peer in self._peers]

    def hear(self, data: bytes) -> list[bytes]:
        """See :meth:`Transport.hear`."""
        return self.hear_some(data, [len(data)] * self._roster.size)

    def hear_some(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        """See :meth:`Transport.hear_some`."""
        inboxes = {peer: torch.empty(sizes[peer], dtype=torch.uint8) for peer in self._peers}
        _wait_for_all([self.receive(inbox, peer, Channel.HEADER) for peer, inbox in inboxes.items() if sizes[peer]])
        heard = {peer: bytes(inbox.numpy()) for peer, inbox in inboxes.items()} | {self._roster.rank: data}
        return [heard[worker] for worker in range(self._roster.size)]

    def let_trail(self, peers: Iterable[int]) -> None:
        """See :meth:`Transport.let_trail`."""
        self._trailing = frozenset(peers)

    def end_turn(self, keep: int = 1) -> None:
        """See :meth:`Transport.end_turn`."""
        self._late.append([])
        while len(self._late) > keep + 1:
            _wait_for_all(self._late.popleft())

    def send(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        """See :meth:`Transport.send`."""
        self.bytes_sent += wire.numel()
        wait = self._begin_to_send(wire, peer, channel)
        if peer not in self._trailing:
            return wait
        self._late[-1].append(wait)
        return _no_wait

    def receive(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        """See :meth:`Transport.receive`."""
        self.bytes_received += wire.numel()
        return self._begin_to_receive(wire, peer, channel)

    def broadcast(self, chunk: Tensor, root: int) -> Wait:
        """See :meth:`Transport.broadcast`."""
        wire = chunk.view(torch.uint8)
        if root == self._roster.rank:
            waits = [self.send(wire, peer, Channel.BROADCAST) for peer in self._peers]
        else:
            waits = [self.receive(wire, root, Channel.BROADCAST)]
        return partial(_wait_for_all, waits)

    def acknowledge(self, root: int) -> Wait:
        """See :meth:`Transport.acknowledge`."""
        if root == self._roster.rank:
            receipts = torch.empty(self._roster.size, 1, dtype=torch.uint8)
            waits = [self.receive(receipts[peer], peer, Channel.RECEIPT) for peer in self._peers]
        else:
            waits = [self.send(torch.zeros(1, dtype=torch.uint8), root, Channel.RECEIPT)]
        return partial(_wait_for_all, waits)


class GlooTransport(Messages):
    """Point-to-point messages over a gloo group of its own.

    Args:
        store: the job's store, for gloo to meet.
        roster: who takes part.
        timeout: how long a peer may take to answer.

    Raises:
        PeerLostError: if the workers cannot connect to each other within ``timeout``.
    """

    def __init__(self, store: Store, roster: Roster, timeout: timedelta) -> None:
        super().__init__(roster)
        self._timeout = timeout
        with recorded_sockets() as self._sockets:
            self._group: Any = self._connect(PrefixStore("outer", store))
        self._sockets.watch(timeout)

    def _connect(self, store: Store) -> Any:  # torch's stubs know nothing of the group's point-to-point methods
        """Connect to all peers; on a thread of its own, for gloo waits without an end for one that fails to."""
        connected: Future[Any] = Future()

        def connect() -> None:
            try:
                address = self._roster.addresses[self._roster.rank]
                group = make_gloo_group(store, self._roster.rank, self._roster.size, self._timeout, address)
                connected.set_result(group)
            except Exception as error:
                connected.set_exception(error)

        threading.Thread(target=connect, name="async-localsgd-connect", daemon=True).start()
        try:
            return connected.result(self._timeout.total_seconds())
        except (RuntimeError, FutureTimeoutError) as error:
            listening = (
                f"{self._roster.name(worker)} at {address or f'what {INTERFACE_VARIABLE} or its host name says'}"
                for worker, address in enumerate(self._roster.addresses)
            )
            raise PeerLostError(
                f"The workers could not connect to each other. They listen: {', '.join(listening)}. If these are not "
                f"the addresses that reach them from the other hosts, set {INTERFACE_VARIABLE} on every host to the "
                "network interface that does (`ip addr` lists them). If they are, let TCP connections through the "
                "firewall between the hosts, to any port."
            ) from error

    def interrupt(self) -> None:
        """See :meth:`Transport.interrupt`."""
        self._sockets.shut_down()

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._group = None

    def _begin_to_send(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        return self._start("send", wire, peer, channel)

    def _begin_to_receive(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        return self._start("recv", wire, peer, channel)

    def _start(self, operation: str, wire: Tensor, peer: int, channel: Channel) -> Wait:
        try:
            work = getattr(self._group, operation)([wire], peer, channel)
        except RuntimeError as error:  # gloo already knows that the connection is closed
            raise self._lost(peer, error) from error
        return partial(self._wait, work, peer)

    def _wait(self, work: Any, peer: int) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: int, error: RuntimeError) -> PeerLostError:
        # gloo has one kind of error for a timeout and a closed connection
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            return self._roster.silence(peer, self._timeout)
        return PeerLostError(
            f"{self._roster.name(peer)} is gone: its connection was closed. Look for the cause in its own log, then "
            "start the job again.",
            gone=peer,
        )


def _no_wait() -> None:
    """Of a send that is waited for later."""


def _wait_for_all(waits: Sequence[Wait]) -> None:
    for wait in waits:
        wait()

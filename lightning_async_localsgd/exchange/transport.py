"""Transport: headers and deltas between workers, straight from each worker to each other one over gloo."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.membership.address import INTERFACE_VARIABLE, make_gloo_group
from lightning_async_localsgd.membership.sockets import recorded_sockets
from lightning_async_localsgd.protocol.header import HEADER_BYTES

__all__ = ["CHUNK", "GlooTransport", "Transport"]

CHUNK = 1 << 20
"""Elements of a delta per message: what the largest wire buffer holds, and what `timeout` applies to."""

_HEADERS, _PAYLOAD, _RECEIPT = 1, 2, 3  # message tags


class Transport(Protocol):
    """Moves bytes between workers. Used by the exchange thread alone, in the same order on every worker."""

    bytes_sent: int
    bytes_received: int

    def gather(self, header: bytes) -> list[bytes]:
        """Give ``header`` to every worker and return all workers' headers, by rank.

        Raises:
            PeerLostError: if a worker cannot be reached within the timeout.
        """

    def broadcast(self, chunk: Tensor, root: int) -> Callable[[], None]:
        """Begin to copy ``chunk`` (contiguous, on the CPU) from worker ``root`` into every other worker's ``chunk``.

        Several can be under way at once.

        Returns:
            What waits until it is done. Until then ``chunk`` belongs to the transport.

        Raises:
            PeerLostError: here or in the wait, if ``root``, or on ``root`` any worker, cannot be reached within the
                timeout.
        """

    def interrupt(self) -> None:
        """End the connections now, from any thread: whoever waits in one, at either end, gets a ``PeerLostError``."""

    def acknowledge(self, root: int) -> Callable[[], None]:
        """Begin to tell worker ``root`` that this worker has got this far; on ``root``, to hear it of all others.

        Returns:
            What waits until it is done.

        Raises:
            PeerLostError: as for :meth:`broadcast`.
        """

    def close(self) -> None:
        """Give up the connections."""


class GlooTransport:
    """All-gather by point-to-point messages over a gloo group of its own.

    Every wait is a wait for one named peer, so that a failure says who: a collective algorithm would blame whichever
    neighbour its ring or tree happens to have.

    Args:
        store: the job's store, for gloo to meet.
        roster: who takes part.
        timeout: how long a peer may take to answer.

    Raises:
        PeerLostError: if the workers cannot connect to each other within ``timeout``.
    """

    def __init__(self, store: Store, roster: Roster, timeout: timedelta) -> None:
        self._roster = roster
        self._timeout = timeout
        with recorded_sockets() as self._sockets:
            self._group: Any = self._connect(PrefixStore("outer", store))
        self._sockets.watch(timeout)
        self._peers = [r for r in range(roster.size) if r != roster.rank]
        self._inbox = torch.zeros(roster.size, HEADER_BYTES, dtype=torch.uint8)
        self.bytes_sent = 0
        self.bytes_received = 0

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

    def gather(self, header: bytes) -> list[bytes]:
        """See :meth:`Transport.gather`."""
        own = self._inbox[self._roster.rank]
        own.copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        receives = [(peer, self._start("recv", self._inbox[peer], peer, _HEADERS)) for peer in self._peers]
        sends = [(peer, self._start("send", own, peer, _HEADERS)) for peer in self._peers]
        self._wait(receives + sends)
        self.bytes_sent += HEADER_BYTES * len(self._peers)
        self.bytes_received += HEADER_BYTES * len(self._peers)
        return [bytes(row.numpy()) for row in self._inbox]

    def broadcast(self, chunk: Tensor, root: int) -> Callable[[], None]:
        """See :meth:`Transport.broadcast`."""
        wire = chunk.view(torch.uint8)
        if root == self._roster.rank:
            works = [(peer, self._start("send", wire, peer, _PAYLOAD)) for peer in self._peers]
            self.bytes_sent += wire.numel() * len(self._peers)
        else:
            works = [(root, self._start("recv", wire, root, _PAYLOAD))]
            self.bytes_received += wire.numel()
        return partial(self._wait, works)

    def interrupt(self) -> None:
        """See :meth:`Transport.interrupt`."""
        self._sockets.shut_down()

    def acknowledge(self, root: int) -> Callable[[], None]:
        """See :meth:`Transport.acknowledge`."""
        if root == self._roster.rank:
            receipts = torch.empty(self._roster.size, 1, dtype=torch.uint8)
            works = [(peer, self._start("recv", receipts[peer], peer, _RECEIPT)) for peer in self._peers]
            self.bytes_received += len(self._peers)
        else:
            works = [(root, self._start("send", torch.zeros(1, dtype=torch.uint8), root, _RECEIPT))]
            self.bytes_sent += 1
        return partial(self._wait, works)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._group = None

    def _start(self, operation: str, tensor: Tensor, peer: int, tag: int) -> Any:
        try:
            return getattr(self._group, operation)([tensor], peer, tag)
        except RuntimeError as error:  # gloo already knows that the connection is closed
            raise self._lost(peer, error) from error

    def _wait(self, works: list[tuple[int, Any]]) -> None:
        deadline = time.monotonic() + self._timeout.total_seconds()
        for peer, work in works:
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
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

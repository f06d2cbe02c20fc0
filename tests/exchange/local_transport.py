"""Transports between threads of one process, for tests of what goes over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Queue
from threading import Event
from typing import NamedTuple, TypeVar

from torch import Tensor

from lightning_async_localsgd.exchange.transport import Channel, Wait

_T = TypeVar("_T")
_TIMEOUT = 30  # seconds


class _Message(NamedTuple):
    wire: Tensor
    taken: Event


class LocalTransport:
    """The :class:`~lightning_async_localsgd.exchange.Transport` of one of several threads.

    Like gloo's, a send reads its memory at any time until the receiver has taken it.
    """

    def __init__(self, rank: int, queues: dict[tuple[int, int, Channel], Queue[_Message]], size: int) -> None:
        self.rank = rank
        self.size = size
        self.bytes_sent = 0
        self.bytes_received = 0
        self._queues = queues

    def send(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        message = _Message(wire, Event())
        self._queues[self.rank, peer, channel].put(message)
        self.bytes_sent += wire.numel()
        return partial(self._await, message.taken)

    @staticmethod
    def _await(taken: Event) -> None:
        assert taken.wait(_TIMEOUT)

    def receive(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        self.bytes_received += wire.numel()
        return partial(self._take, wire, self._queues[peer, self.rank, channel])

    @staticmethod
    def _take(wire: Tensor, queue: Queue[_Message]) -> None:
        sent = queue.get(timeout=_TIMEOUT)
        assert sent.wire.shape == wire.shape
        wire.copy_(sent.wire)
        sent.taken.set()

    def broadcast(self, chunk: Tensor, root: int) -> Wait:
        peers = [peer for peer in range(self.size) if peer != self.rank]
        if root != self.rank:
            return self.receive(chunk, root, Channel.BROADCAST)
        waits = [self.send(chunk, peer, Channel.BROADCAST) for peer in peers]
        return lambda: [wait() for wait in waits] and None

    def gather(self, data: bytes) -> list[bytes]:
        raise NotImplementedError

    def gather_some(self, data: bytes, sizes: Sequence[int]) -> list[bytes]:
        raise NotImplementedError

    def acknowledge(self, root: int) -> Wait:
        raise NotImplementedError

    def interrupt(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def run_threads(function: Callable[[LocalTransport], _T], size: int) -> list[_T]:
    """Call ``function(transport)`` in threads that are connected to each other; returns the results by rank."""
    queues = {(a, b, channel): Queue[_Message]() for a in range(size) for b in range(size) for channel in Channel}
    transports = [LocalTransport(rank, queues, size) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, transports))

"""Messages over the connections of one view of the membership."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from functools import partial

import numpy as np
from torch import Tensor

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.exchange.link import CONTROL, Link, Sending
from lightning_async_localsgd.exchange.mesh import Lane, Mesh
from lightning_async_localsgd.exchange.transport import Channel, Messages, Wait
from lightning_async_localsgd.membership import Roster

__all__ = ["TcpTransport"]

_SOON = 0.5  # seconds


class TcpTransport(Messages):
    """Point-to-point messages over the connections of one view. See :class:`Messages`.

    Args:
        mesh: serves the connections.
        connections: by rank and lane, as :meth:`Mesh.connect` has made them.
        roster: who takes part.
        timeout: how long a peer may take to answer.
        on_control: called on the mesh's thread with each control message and the rank of its sender.
    """

    def __init__(
        self,
        mesh: Mesh,
        connections: dict[tuple[int, int], socket.socket],
        roster: Roster,
        timeout: timedelta,
        on_control: Callable[[int, bytes], object],
    ) -> None:
        super().__init__(roster)
        self._mesh = mesh
        self._timeout = timeout
        self._interrupted = False

        async def link() -> dict[tuple[int, int], Link]:
            loop, links = asyncio.get_running_loop(), {}
            for (rank, lane), connection in connections.items():
                links[rank, lane] = Link(partial(on_control, rank), partial(self._on_lost, rank))
                await loop.connect_accepted_socket(partial(links.__getitem__, (rank, lane)), connection)
            return links

        self._links = mesh.run(link()).result()

    def tell_control(self, data: bytes) -> None:
        """Send a control message to all peers, from any thread, past all that is under way."""
        for peer in self._peers:
            link = self._links[peer, Lane.CONTROL]
            self._mesh.call(link.send, Sending(CONTROL, memoryview(data), None))

    def interrupt(self) -> None:
        """See :meth:`Transport.interrupt`."""
        self._interrupted = True
        for link in self._links.values():
            self._mesh.call(link.connection.abort)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        for link in self._links.values():
            self._mesh.call(link.close)

    def _on_lost(self, rank: int, error: BaseException | None) -> None:
        """A peer with one connection is no peer: end the other soon, when what is under way there has come."""
        for lane in Lane:
            link = getattr(self, "_links", {}).get((rank, lane))
            if link is not None:
                asyncio.get_running_loop().call_later(_SOON, link.connection.abort)

    def _begin_to_send(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        sent: Future[None] = Future()
        self._mesh.call(self._links[peer, Lane.TURNS].send, Sending(channel, _bytes(wire), sent))
        return partial(self._wait, sent, peer)

    def _begin_to_receive(self, wire: Tensor, peer: int, channel: Channel) -> Wait:
        received: Future[None] = Future()
        self._mesh.call(self._links[peer, Lane.TURNS].post, channel, _bytes(wire), received)
        return partial(self._wait, received, peer)

    def _wait(self, future: Future[None], peer: int) -> None:
        try:
            future.result(self._timeout.total_seconds())
        except FutureTimeoutError:
            raise self._roster.silence(peer, self._timeout) from None
        except Exception as error:
            if isinstance(error, ValueError):
                text = f"{self._roster.name(peer)} sent something else than expected: {error}."
            else:
                text = f"{self._roster.name(peer)} is gone: {error}."
            raise PeerLostError(text, gone=peer) from error


def _bytes(wire: Tensor) -> memoryview:
    data: np.ndarray = wire.numpy()
    return memoryview(data.view(np.uint8)).cast("B")  # type: ignore[arg-type]

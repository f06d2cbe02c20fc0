"""The mesh: connections between workers that come and go, made anew for each view of the membership.

Every pair of members has two connections: one for the messages of turns, one for control, which so never queues behind
deltas. Whoever connects proves first that it knows the job's token, and so does who answers; until then neither reads
more than that. One thread of the process serves all connections.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership.sockets import watch_socket
from lightning_async_localsgd.protocol.members import Member, View

__all__ = ["Lane", "Mesh", "UnreachableError"]

T = TypeVar("T")

_HELLO = struct.Struct("<4s32sHB16s")  # magic, key of the view, rank, lane, nonce
_MAGIC = b"ALSM"
_PROOF, _NONCE = 32, 16  # bytes
_RETRY = 0.05  # seconds between two attempts to connect
_GREETING = 5.0  # seconds
_LOOK = 0.25  # seconds between two looks whether the view is still that of now
_MOST_GREETINGS = 64  # at the same time
_UNCLAIMED = 256  # connections that wait for this worker to learn of their view


class UnreachableError(PeerLostError):
    """Some members of a view could not be connected to.

    Args:
        message: what to do.
        members: these.
    """

    def __init__(self, message: str, members: tuple[Member, ...]) -> None:
        super().__init__(message)
        self.members = members


class Lane(IntEnum):
    """What a connection is for."""

    TURNS = 0
    CONTROL = 1


class _Claim(NamedTuple):
    """Which connection it is: that of a member of a view."""

    key: str
    rank: int
    lane: int


class Mesh:
    """This process among the others: the place where it listens, and the thread that serves its connections.

    Args:
        prove: what only workers of the job can tell of some values, in 64 hexadecimal digits.
        host: the address to listen at; empty: all.
        port: the port; 0: any that is free.
        timeout: how long a silent connection is kept.
    """

    def __init__(
        self,
        prove: Callable[..., str],
        host: str = "",
        port: int = 0,
        timeout: timedelta = timedelta(seconds=30),
    ) -> None:
        self._prove = prove
        self._timeout = timeout
        self._unclaimed: dict[_Claim, socket.socket] = {}
        self._wanted: dict[_Claim, asyncio.Future[socket.socket]] = {}
        self._greetings: set[asyncio.Task[None]] = set()
        families = (socket.AF_INET6, True) if not host and socket.has_dualstack_ipv6() else (socket.AF_INET, False)
        self._listening = socket.create_server((host, port), family=families[0], dualstack_ipv6=families[1])
        self._listening.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="async-localsgd-mesh", daemon=True)
        self._thread.start()
        self.run(self._listen())

    @property
    def port(self) -> int:
        """The port at which this process listens."""
        return int(self._listening.getsockname()[1])

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the mesh's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function on the mesh's thread, soon."""
        with suppress(RuntimeError):  # the mesh is closed
            self._loop.call_soon_threadsafe(function, *args)

    def close(self) -> None:
        """End all connections and the thread."""

        async def end() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            self._listening.close()
            for connection in self._unclaimed.values():
                connection.close()
            self._loop.call_later(0.1, self._loop.stop)  # what is to be sent still goes out

        with suppress(RuntimeError):
            self.run(end())
            self._thread.join(1)
            if not self._thread.is_alive():
                self._loop.close()

    def connect(
        self, view: View, rank: int, timeout: float, is_current: Callable[[], bool]
    ) -> dict[tuple[int, int], socket.socket]:
        """Connect to all other members of a view.

        Args:
            view: the view.
            rank: this process among its members.
            timeout: seconds for connecting to those of lower ranks. Those of higher ranks connect to this process, and
                may have something else to end before: they are waited for.
            is_current: whether the view is still that of now.

        Returns:
            The connections, by rank and lane. Nothing is read from them yet.

        Raises:
            UnreachableError: naming those who could not be connected to.
            PeerLostError: if the view is no longer that of now.
        """
        return self.run(self._connect(view, rank, timeout, is_current)).result()

    async def _connect(
        self, view: View, rank: int, timeout: float, is_current: Callable[[], bool]
    ) -> dict[tuple[int, int], socket.socket]:
        claims = [_Claim(view.key, r, lane) for r in range(len(view.members)) if r != rank for lane in Lane]
        dialled = {
            asyncio.ensure_future(self._dial(claim, rank, view.members[claim.rank])): claim
            for claim in claims
            if claim.rank < rank
        }
        awaited = {asyncio.ensure_future(self._await(claim)): claim for claim in claims if claim.rank > rank}
        found: dict[tuple[int, int], socket.socket] = {}
        try:
            if dialled:
                await asyncio.wait(dialled, timeout=timeout)
            lost = sorted({c.rank for task, c in dialled.items() if not task.done() or task.exception() is not None})
            if lost:
                members = tuple(view.members[r] for r in lost)
                where = ", ".join(f"{m.name} (at {m.host}:{m.port})" for m in members)
                raise UnreachableError(f"Worker {where} could not be connected to.", members)
            waiting: set[asyncio.Future[socket.socket]] = set(awaited)
            while waiting:
                if not is_current():
                    raise PeerLostError("The view has changed.")
                _, waiting = await asyncio.wait(waiting, timeout=_LOOK)
            found = {(claim.rank, claim.lane): task.result() for task, claim in (dialled | awaited).items()}
            return found
        finally:
            if not found:
                for task in dialled | awaited:
                    if task.done() and not task.cancelled() and task.exception() is None:
                        task.result().close()
                    task.cancel()

    # ---- greetings --------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listening)
            except OSError:
                await asyncio.sleep(_RETRY)  # too many files are open
                continue
            if len(self._greetings) >= _MOST_GREETINGS:
                connection.close()
                continue
            task = self._loop.create_task(self._answer(connection))
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)

    async def _dial(self, claim: _Claim, own: int, member: Member) -> socket.socket:
        while True:
            with suppress(OSError, asyncio.TimeoutError):
                return await asyncio.wait_for(self._dial_once(claim, own, member), _GREETING)
            await asyncio.sleep(_RETRY)

    async def _dial_once(self, claim: _Claim, own: int, member: Member) -> socket.socket:
        [(family, kind, protocol, _, address), *_] = await self._loop.getaddrinfo(
            member.host, member.port, type=socket.SOCK_STREAM
        )
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            await self._loop.sock_connect(connection, address)
            hello = _HELLO.pack(_MAGIC, claim.key.encode(), own, claim.lane, os.urandom(_NONCE))
            await self._loop.sock_sendall(connection, hello)
            answer = await self._read(connection, _NONCE + _PROOF)
            nonce, proof = answer[:_NONCE], answer[_NONCE:]
            if not hmac.compare_digest(proof, self._proof("answers", hello, nonce)):
                raise ConnectionError("it does not know the token")
            await self._loop.sock_sendall(connection, self._proof("dials", hello, nonce))
            watch_socket(connection.fileno(), self._timeout)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _answer(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            await asyncio.wait_for(self._greet(connection), _GREETING)
        except (OSError, ValueError, asyncio.TimeoutError):
            connection.close()
        except BaseException:
            connection.close()
            raise

    async def _greet(self, connection: socket.socket) -> None:
        hello = await self._read(connection, _HELLO.size)
        magic, key, rank, lane, _ = _HELLO.unpack(hello)
        if magic != _MAGIC or lane not in list(Lane):
            raise ValueError("not a worker")
        nonce = os.urandom(_NONCE)
        await self._loop.sock_sendall(connection, nonce + self._proof("answers", hello, nonce))
        proof = await self._read(connection, _PROOF)
        if not hmac.compare_digest(proof, self._proof("dials", hello, nonce)):
            raise ValueError("it does not know the token")
        watch_socket(connection.fileno(), self._timeout)
        self._arrived(_Claim(key.decode(), rank, lane), connection)

    async def _read(self, connection: socket.socket, size: int) -> bytes:
        """So many bytes, and not one more: what follows is for who uses the connection."""
        data = b""
        while len(data) < size:
            more = await self._loop.sock_recv(connection, size - len(data))
            if not more:
                raise ConnectionError("it has closed the connection")
            data += more
        return data

    def _proof(self, role: str, hello: bytes, nonce: bytes) -> bytes:
        return bytes.fromhex(self._prove(role, hello.hex(), nonce.hex()))

    def _arrived(self, claim: _Claim, connection: socket.socket) -> None:
        wanted = self._wanted.pop(claim, None)
        if wanted is not None and not wanted.done():
            wanted.set_result(connection)
            return
        if claim in self._unclaimed:
            self._unclaimed.pop(claim).close()
        self._unclaimed[claim] = connection
        if len(self._unclaimed) > _UNCLAIMED:
            self._unclaimed.pop(next(iter(self._unclaimed))).close()

    async def _await(self, claim: _Claim) -> socket.socket:
        if claim in self._unclaimed:
            return self._unclaimed.pop(claim)
        wanted: asyncio.Future[socket.socket] = self._loop.create_future()
        self._wanted[claim] = wanted
        try:
            return await wanted
        finally:
            self._wanted.pop(claim, None)

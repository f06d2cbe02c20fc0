"""A link: messages of several channels over one connection with a peer, read and written where they are."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple, cast

__all__ = ["CONTROL", "Link", "Sending"]

CONTROL = 0
"""The channel of control messages, which nobody waits for."""

_HEAD = struct.Struct("<BI")  # channel, bytes of what follows
_MOST_CONTROL = 1 << 16  # bytes of a control message
_UNEXPECTED = 1 << 26  # bytes that may come before they are waited for
_AT_ONCE = 1 << 18  # bytes given to the system at once


class _Posted(NamedTuple):
    target: memoryview
    received: Future[None]


class Sending(NamedTuple):
    """A message to send."""

    channel: int
    data: memoryview
    sent: Future[None] | None


class Link(asyncio.BufferedProtocol):
    """One connection with a peer. All of it is the mesh's thread's.

    Args:
        on_control: called with each control message.
        on_lost: called when the connection ends, with the reason.
    """

    def __init__(
        self,
        on_control: Callable[[bytes], object],
        on_lost: Callable[[BaseException | None], object],
    ) -> None:
        self.connection: asyncio.Transport
        self._on_control = on_control
        self._on_lost = on_lost
        self._error: BaseException | None = None
        self._head = memoryview(bytearray(_HEAD.size))
        self._target = self._head  # what the bytes that come next go to
        self._filled = 0
        self._channel = -1  # of the frame that comes; -1: its head comes
        self._receiving: _Posted | None = None  # who waits for it, if anybody does
        self._posted: dict[int, deque[_Posted]] = {}  # by channel
        self._come: dict[int, deque[memoryview]] = {}  # by channel: messages that nobody has waited for
        self._held = 0  # bytes of them
        self._outgoing: deque[Sending] = deque()
        self._at = -1  # bytes of the first that are given away; -1: not even its head
        self._writing = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection's bytes are read and written here from now on."""
        self.connection = cast(asyncio.Transport, transport)
        self.connection.set_write_buffer_limits(high=2 * _AT_ONCE)

    # ---- receiving --------------------------------------------------------------------------------------------------

    def post(self, channel: int, target: memoryview, received: Future[None]) -> None:
        """Have the next message of a channel written to ``target``."""
        if self._error is not None:
            _settle(received, self._error)
            return
        self._posted.setdefault(channel, deque()).append(_Posted(target, received))
        self._hand_over(channel)

    def _hand_over(self, channel: int) -> None:
        """Give messages that have come to those who wait for them, in order."""
        posted, come = self._posted.get(channel), self._come.get(channel)
        while posted and come:
            (target, received), data = posted.popleft(), come.popleft()
            self._held -= len(data)
            if len(data) != len(target):
                self._fail(ValueError(f"a message of {len(data)} bytes came for one of {len(target)}"))
                _settle(received, self._error)
                return
            target[:] = data
            _settle(received, None)
        if self._held <= _UNEXPECTED:
            self.connection.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._target[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes have come."""
        self._filled += nbytes
        while self._error is None and self._filled == len(self._target):
            if self._channel < 0:
                self._begin_message(*_HEAD.unpack(self._head))
            else:
                self._end_message()

    def _begin_message(self, channel: int, size: int) -> None:
        """Receive a message where it is waited for, if it is the next of its channel; else hold it."""
        if size > (_MOST_CONTROL if channel == CONTROL else _UNEXPECTED):
            self._fail(ValueError(f"a message of {size} bytes"))
            return
        posted = self._posted.get(channel)
        if posted and not self._come.get(channel) and len(posted[0].target) == size:
            self._receiving = posted.popleft()
            self._target = self._receiving.target
        else:
            self._target = memoryview(bytearray(size))
        self._channel, self._filled = channel, 0

    def _end_message(self) -> None:
        channel, data, receiving = self._channel, self._target, self._receiving
        self._channel, self._target, self._filled, self._receiving = -1, self._head, 0, None
        if channel == CONTROL:
            self._on_control(bytes(data))
        elif receiving is not None:
            _settle(receiving.received, None)
        else:
            self._come.setdefault(channel, deque()).append(data)
            self._held += len(data)
            self._hand_over(channel)
            if self._held > _UNEXPECTED and self._error is None:
                self.connection.pause_reading()

    # ---- sending ----------------------------------------------------------------------------------------------------

    def send(self, sending: Sending) -> None:
        """Send a message after those before."""
        if self._error is not None:
            if sending.sent is not None:
                _settle(sending.sent, self._error)
            return
        self._outgoing.append(sending)
        self._pump()

    def _pump(self) -> None:
        while self._outgoing and self._writing and self._error is None:
            sending = self._outgoing[0]
            if self._at < 0:
                self.connection.write(_HEAD.pack(sending.channel, len(sending.data)))
                self._at = 0
            if self._at < len(sending.data):
                self.connection.write(bytes(sending.data[self._at : self._at + _AT_ONCE]))  # it keeps what it gets
                self._at += _AT_ONCE
            if self._at >= len(sending.data):
                self._outgoing.popleft()
                self._at = -1
                if sending.sent is not None:
                    _settle(sending.sent, None)

    def pause_writing(self) -> None:
        """The system takes no more for now."""
        self._writing = False

    def resume_writing(self) -> None:
        """The system takes more again."""
        self._writing = True
        self._pump()

    # ---- the end ----------------------------------------------------------------------------------------------------

    def eof_received(self) -> bool:
        """The peer sends no more."""
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection has ended."""
        self._fail(exc or ConnectionError("it has closed the connection"))

    def close(self) -> None:
        """End the connection once all is sent."""
        self.connection.close()

    def _fail(self, error: BaseException) -> None:
        if self._error is not None:
            return
        self._error = error
        self.connection.abort()
        waiting = [one.received for posted in self._posted.values() for one in posted]
        waiting += [sending.sent for sending in self._outgoing if sending.sent is not None]
        waiting += [self._receiving.received] if self._receiving is not None else []
        self._posted.clear()
        self._outgoing.clear()
        for future in waiting:
            _settle(future, error)
        self._on_lost(error)


def _settle(future: Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)

"""The sockets of connections to other processes, recorded as they are opened, because gloo hides its own.

With its socket, a connection can notice a frozen or unplugged peer, and a transfer can be interrupted. Processes forked
later (the workers of a ``DataLoader``) can be kept from holding a connection open after the end of this process.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

__all__ = ["Sockets", "recorded_sockets", "watch_socket"]

_DESCRIPTORS = "/dev/fd"
_PROBES = 4  # a connection ends after as many unanswered probes


class _Socket(NamedTuple):
    """An open socket. Its descriptor may later be reused for another file; that file has another inode."""

    descriptor: int
    inode: int


class Sockets:
    """Sockets of this process."""

    def __init__(self) -> None:
        self._sockets: set[_Socket] = set()

    def add(self, sockets: set[_Socket]) -> None:
        """Add the TCP sockets among ``sockets``. Processes started from now on do not inherit them."""
        for entry in sockets:
            with _open(entry) as opened:
                if opened is not None:
                    with suppress(OSError):  # another thread has just closed it
                        os.set_inheritable(entry.descriptor, False)
                    self._sockets.add(entry)
                    _not_for_children.add(entry)

    def watch(self, timeout: timedelta) -> None:
        """Have the system end a connection whose peer is silent for about ``timeout``, even without traffic."""
        for entry in self._sockets:
            with _open(entry) as opened:
                if opened is not None:
                    _keep_alive(opened, timeout)

    def shut_down(self) -> None:
        """End the connections at once. Every transfer that waits in one, at either end, raises an error."""
        for entry in self._sockets:
            with _open(entry) as opened:
                if opened is not None and _connected(opened):  # an error of a listening socket is fatal to gloo
                    opened.shutdown(socket.SHUT_RDWR)


def watch_socket(descriptor: int, timeout: timedelta) -> None:
    """Have the system end a connection of this process whose peer is silent for about ``timeout``.

    Processes forked from now on release it.
    """
    found = Sockets()
    found.add({_Socket(descriptor, os.fstat(descriptor).st_ino)})
    found.watch(timeout)


@contextmanager
def recorded_sockets() -> Iterator[Sockets]:
    """Record the sockets that any thread of this process opens in the body."""
    found = Sockets()
    before = _open_sockets()
    _not_for_children.intersection_update(before)
    try:
        yield found
    finally:
        found.add(_open_sockets() - before - _not_for_children)  # another thread may have recorded some


_not_for_children: set[_Socket] = set()


def _open_sockets() -> set[_Socket]:
    """The sockets of this process."""
    found = set()
    for name in os.listdir(_DESCRIPTORS) if os.path.isdir(_DESCRIPTORS) else ():
        with suppress(OSError):  # the descriptor of the listing itself, or one that was closed meanwhile
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.add(_Socket(int(name), status.st_ino))
    return found


@contextmanager
def _open(entry: _Socket) -> Iterator[socket.socket | None]:
    """The socket for the body, by a descriptor of its own; None if it is closed or not a TCP socket."""
    try:
        opened = socket.socket(fileno=os.dup(entry.descriptor))
    except OSError:
        yield None
        return
    with opened:
        same = os.fstat(opened.fileno()).st_ino == entry.inode
        yield opened if same and opened.family in (socket.AF_INET, socket.AF_INET6) else None


def _connected(opened: socket.socket) -> bool:
    try:
        opened.getpeername()
    except OSError:
        return False
    return True


def _keep_alive(opened: socket.socket, timeout: timedelta) -> None:
    seconds = timeout.total_seconds()
    period = max(1, round(seconds / (_PROBES + 1)))
    options = {"TCP_KEEPIDLE": period, "TCP_KEEPINTVL": period, "TCP_KEEPCNT": _PROBES}
    options["TCP_USER_TIMEOUT"] = max(1, round(1000 * seconds))
    with suppress(OSError):  # it has just been closed
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):  # systems differ
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _forget_in_child() -> None:
    """Release the parent's connections in a forked process.

    Their descriptors are redirected instead of closed: their owners may close them once more, by number.
    """
    if not _not_for_children:
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor, inode in _not_for_children:
        with suppress(OSError):
            if os.fstat(descriptor).st_ino == inode:
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
    _not_for_children.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)

"""Connections between workers that come and go: who is let in, and what becomes of messages."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.exchange.mesh import Mesh, UnreachableError
from lightning_async_localsgd.exchange.tcp import TcpTransport
from lightning_async_localsgd.exchange.transport import Channel
from lightning_async_localsgd.membership import Roster
from lightning_async_localsgd.membership.elastic import Lighthouse
from lightning_async_localsgd.protocol.members import Member, View

TIMEOUT = timedelta(seconds=20)
Control = list[tuple[int, bytes]]


@pytest.fixture
def make_mesh() -> Iterator[Callable[..., Mesh]]:
    meshes: list[Mesh] = []

    def make(token: str = "secret") -> Mesh:
        meshes.append(Mesh(Lighthouse("nowhere:1", token=token).proof, timeout=TIMEOUT))
        return meshes[-1]

    yield make
    for mesh in meshes:
        mesh.close()


def view_of(*meshes: Mesh, attempt: int = 0) -> View:
    return View(tuple(Member(f"w{i}", str(i), "127.0.0.1", mesh.port) for i, mesh in enumerate(meshes)), attempt)


def connect(*meshes: Mesh, told: Control | None = None) -> list[TcpTransport]:
    view, size = view_of(*meshes), len(meshes)

    def join(rank: int) -> TcpTransport:
        connections = meshes[rank].connect(view, rank, 10, lambda: True)
        roster = Roster(rank, ["host"] * size)
        hear = (lambda peer, data: told.append((peer, data))) if told is not None else (lambda peer, data: None)
        return TcpTransport(meshes[rank], connections, roster, TIMEOUT, hear)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(join, range(size)))


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_messages_of_a_channel_come_in_order_whenever_they_are_waited_for(make_mesh: Callable[..., Mesh]) -> None:
    one, other = connect(make_mesh(), make_mesh())
    late, early = torch.empty(2, dtype=torch.uint8), torch.empty(3, dtype=torch.uint8)
    of_sum = one.receive(late, 1, Channel.SUM)  # waited for before it is sent
    sends = [other.send(tensor(*m), 0, c) for m, c in (((1, 2, 3), Channel.DELTA), ((4, 5), Channel.SUM))]
    of_sum()
    one.receive(early, 1, Channel.DELTA)()  # it has come long ago
    for wait in sends:
        wait()
    assert early.tolist() == [1, 2, 3] and late.tolist() == [4, 5]
    assert (one.bytes_received, other.bytes_sent) == (5, 5)


def test_large_messages_both_ways_at_once(make_mesh: Callable[..., Mesh]) -> None:
    transports = connect(make_mesh(), make_mesh(), make_mesh())
    data = [torch.randint(0, 256, (3_000_000,), dtype=torch.uint8) for _ in transports]
    inboxes: list[dict[int, torch.Tensor]] = [{} for _ in transports]
    waits = []
    for rank, transport in enumerate(transports):
        for peer in {0, 1, 2} - {rank}:
            inboxes[rank][peer] = torch.empty_like(data[peer])
            waits.append(transport.receive(inboxes[rank][peer], peer, Channel.DELTA))
            waits.append(transport.send(data[rank], peer, Channel.DELTA))
    for wait in waits:
        wait()
    for inbox in inboxes:
        assert all(torch.equal(found, data[peer]) for peer, found in inbox.items())


def test_control_does_not_wait_for_anybody(make_mesh: Callable[..., Mesh]) -> None:
    told: Control = []
    one, other = connect(make_mesh(), make_mesh(), told=told)
    big = torch.zeros(1 << 24, dtype=torch.uint8)
    send = one.send(big, 1, Channel.DELTA)
    one.tell_control(b"now")
    end = time.monotonic() + 10
    while not told and time.monotonic() < end:  # nobody receives what is under way
        time.sleep(0.01)
    wait = other.receive(torch.empty_like(big), 0, Channel.DELTA)
    send()
    wait()
    assert told == [(0, b"now")]


def test_whoever_waits_is_told_that_a_peer_is_gone(make_mesh: Callable[..., Mesh]) -> None:
    one, other = connect(make_mesh(), make_mesh())
    wait = one.receive(tensor(0), 1, Channel.DELTA)
    other.interrupt()
    with pytest.raises(PeerLostError, match=r"Worker 1 .* is gone"):
        wait()
    with pytest.raises(PeerLostError, match=r"Worker 1 .* is gone"):
        one.send(tensor(0), 1, Channel.DELTA)()


def test_a_message_of_another_length_names_its_sender(make_mesh: Callable[..., Mesh]) -> None:
    one, other = connect(make_mesh(), make_mesh())
    other.send(tensor(1, 2), 0, Channel.SUM)()
    with pytest.raises(PeerLostError, match=r"Worker 1 .* sent something else than expected"):
        one.receive(tensor(0), 1, Channel.SUM)()


def test_without_the_token_nobody_is_let_in(make_mesh: Callable[..., Mesh]) -> None:
    one, stranger = make_mesh(), make_mesh("guessed")
    view, over = view_of(one, stranger), threading.Event()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(one.connect, view, 0, 10, lambda: not over.is_set())
        with pytest.raises(UnreachableError) as caught:
            stranger.connect(view, 1, 0.5, lambda: True)
        assert [member.name for member in caught.value.members] == ["w0"]
        assert not waiting.done()
        over.set()
        with pytest.raises(PeerLostError, match="The view has changed"):
            waiting.result()


def test_messages_sent_with_the_greeting_are_not_lost(make_mesh: Callable[..., Mesh]) -> None:
    one, other = make_mesh(), make_mesh()
    view = view_of(one, other)
    with ThreadPoolExecutor() as pool:
        sockets = pool.submit(other.connect, view, 1, 10, lambda: True)
        held = one.connect(view, 0, 10, lambda: True)  # nothing is read from it yet
        sender = TcpTransport(other, sockets.result(), Roster(1, ["host"] * 2), TIMEOUT, lambda peer, data: None)
        sender.send(tensor(1, 2, 3), 0, Channel.DELTA)()
        time.sleep(0.1)
        receiver = TcpTransport(one, held, Roster(0, ["host"] * 2), TIMEOUT, lambda peer, data: None)
        inbox = tensor(0, 0, 0)
        receiver.receive(inbox, 1, Channel.DELTA)()
    assert inbox.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "greeting", [b"", b"GET / HTTP/1.1\r\n\r\n", b"ALSM" + b"\0" * 51, b"ALSM" + b"a" * 32 + b"\0" * 200, b"x" * 10_000]
)
def test_whatever_comes_from_a_stranger_the_others_meet(make_mesh: Callable[..., Mesh], greeting: bytes) -> None:
    meshes = [make_mesh(), make_mesh()]
    strangers = [socket.create_connection(("127.0.0.1", mesh.port)) for mesh in meshes]
    for stranger in strangers:
        stranger.sendall(greeting)
    one, other = connect(*meshes)
    other.send(tensor(7), 0, Channel.SUM)()
    inbox = tensor(0)
    one.receive(inbox, 1, Channel.SUM)()
    assert inbox.tolist() == [7]
    for stranger in strangers:
        stranger.close()


def test_a_head_that_claims_too_much_ends_the_connection_and_allocates_nothing(make_mesh: Callable[..., Mesh]) -> None:
    one, other = connect(make_mesh(), make_mesh())
    link: Any = next(iter(other._links.values()))
    other._mesh.call(link.connection.write, struct.pack("<BI", 4, (1 << 32) - 1))
    with pytest.raises(PeerLostError, match="Worker 1"):
        one.receive(tensor(0), 1, Channel.DELTA)()

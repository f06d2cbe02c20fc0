"""A bell is heard by everyone, in order, and nobody listens after its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from lightning_async_localsgd.exchange.doorbell import Bell
from lightning_async_localsgd.membership import JobStore
from tests.processes import make_store

WAIT = 30.0  # seconds until a test that fails gives up


class Listener:
    """A worker's bell, and what it has heard."""

    def __init__(self, store: Any) -> None:
        self.heard: SimpleQueue[int] = SimpleQueue()
        self.lost: SimpleQueue[Exception] = SimpleQueue()
        self.bell = Bell(JobStore(store, timedelta(seconds=WAIT)), self.heard.put, self.lost.put)


def listening() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "async-localsgd-bell"]


@pytest.fixture
def store() -> Iterator[Any]:
    native = make_store()
    yield PrefixStore("run", native)
    del native


def test_all_hear_every_turn_in_order_whoever_opens_it(store: Any) -> None:
    listeners = [Listener(store) for _ in range(3)]
    for listener in listeners:
        listener.bell.start()
    for turn in range(6):
        listeners[turn % 3].bell.ring(turn)
        if turn % 2:
            listeners[0].bell.ring(turn)  # two at once are one
    for listener in listeners:
        assert [listener.heard.get(timeout=WAIT) for _ in range(6)] == list(range(6))
    for listener in listeners:
        listener.bell.close()
    assert all(listener.lost.empty() for listener in listeners)
    assert not listening()


def test_a_turn_that_was_opened_before_is_heard_by_who_comes_later(store: Any) -> None:
    first, second = Listener(store), Listener(store)
    first.bell.ring(0)
    second.bell.start()
    assert second.heard.get(timeout=WAIT) == 0
    second.bell.close()


def test_turns_that_were_cleared_leave_nothing_in_the_store() -> None:
    store = HashStore()
    listener = Listener(store)
    for turn in range(5):
        listener.bell.ring(turn)
    assert store.num_keys() == 5
    for turn in range(5):
        listener.bell.clear(turn)
    assert store.num_keys() == 0


def test_a_bell_that_never_listened_closes_without_a_sound() -> None:
    store = HashStore()
    Listener(store).bell.close()
    assert store.num_keys() == 0


def test_who_loses_the_store_is_told() -> None:
    host = make_store()
    listener = Listener(TCPStore("127.0.0.1", host.port, is_master=False))
    listener.bell.start()
    listener.bell.ring(0)
    assert listener.heard.get(timeout=WAIT) == 0
    del host
    assert isinstance(listener.lost.get(timeout=WAIT), RuntimeError)
    listener.bell.close()

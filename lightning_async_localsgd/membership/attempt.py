"""The name space of one attempt of a job: no attempt reads keys that a dead attempt has left in the same store."""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta
from typing import NamedTuple

from lightning_async_localsgd.errors import PeerLostError
from lightning_async_localsgd.membership.address import Route, choose_addresses, route_to
from lightning_async_localsgd.membership.store import JobStore

__all__ = ["Attempt", "agree"]

_SLICE = timedelta(seconds=0.2)


class Attempt(NamedTuple):
    """The name and addresses that all processes of one attempt agree on."""

    name: str
    """A name that no earlier attempt had."""
    addresses: list[str | None]
    """The address at which each process is to listen; None: gloo's choice."""


def agree(store: JobStore, rank: int, size: int, timeout: timedelta) -> Attempt:
    """Agree with the other processes of a job on a name that no earlier attempt had.

    Launchers keep a store over restarts (torchrun's static rendezvous and c10d alike), and their count of restarts is
    not the same on all machines. So process 0 invents a name and writes it to the store. Every other process writes an
    answer, a name of its own, under that name. When process 0 has read all answers, it lists the ones it has taken. A
    process without an answer in that list has read the name of a dead attempt, and waits for another one.

    Args:
        store: a part of the store that all attempts share.
        rank: rank of this process.
        size: number of processes.
        timeout: maximum time to wait for the others.

    Raises:
        PeerLostError: if some processes do not come within ``timeout``.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    answer = json.dumps([uuid.uuid4().hex, route_to(store.native)])
    name = _invite(store, answer, size, deadline) if rank == 0 else _answer(store, answer, rank, size, deadline)
    answers = json.loads(store.get(f"{name}/taken"))
    return Attempt(name, choose_addresses([Route(*json.loads(answer)[1]) for answer in answers]))


def _invite(store: JobStore, own: str, size: int, deadline: float) -> str:
    name = uuid.uuid4().hex
    store.set("attempt", name)
    answers = {rank: f"{name}/answer/{rank}" for rank in range(1, size)}
    while not store.wait(list(answers.values()), _SLICE):
        if time.monotonic() > deadline:
            raise _missing([rank for rank, key in answers.items() if not store.check([key])], size)
    store.set(f"{name}/taken", json.dumps([own, *store.multi_get(list(answers.values()))]))
    return name


def _answer(store: JobStore, own: str, rank: int, size: int, deadline: float) -> str:
    while time.monotonic() < deadline:
        if not store.wait(["attempt"], _SLICE):
            continue
        name = store.get("attempt")
        store.set(f"{name}/answer/{rank}", own)
        if not store.wait([f"{name}/taken"], _SLICE):
            continue
        if own in json.loads(store.get(f"{name}/taken")):
            return name
        time.sleep(_SLICE.total_seconds())  # a dead attempt: its process 0 will never answer
    raise _missing([0], size)


def _missing(ranks: list[int], size: int) -> PeerLostError:
    return PeerLostError(
        f"Worker {', '.join(map(str, ranks))} of {size} did not come. It failed or was not started: look at its log, "
        "or raise `timeout`."
    )

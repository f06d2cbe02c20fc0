"""The store's host may freeze, and processes may die or be slow: calls and waits end in time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, PrefixStore, TCPStore

from lightning_async_localsgd import PeerAbortedError, PeerLostError
from lightning_async_localsgd.membership import JobStore, StaticJob, join_job
from lightning_async_localsgd.membership.attempt import agree
from lightning_async_localsgd.trainer import relay
from lightning_async_localsgd.trainer.relay import Relay
from tests.processes import run_processes, start_process

SHORT, LONG = timedelta(seconds=0.5), timedelta(seconds=60)


def serve(sender: Connection) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sender.send(store.port)
    signal.pause()


@pytest.fixture
def frozen() -> Iterator[TCPStore]:
    """A store with a stopped host."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = start_process(serve, sender)
    sender.close()
    assert process.pid is not None
    store = TCPStore("127.0.0.1", receiver.recv(), is_master=False)
    os.kill(process.pid, signal.SIGSTOP)
    yield store
    process.kill()
    process.join()


CALLS: dict[str, Callable[[JobStore], Any]] = {
    "get": lambda store: store.get("key"),
    "add": lambda store: store.add("key", 1),
    "check": lambda store: store.check(["key"]),
    "wait": lambda store: store.wait(["key"], SHORT),
    "compare_set": lambda store: store.compare_set("key", "", "value"),
}


def test_no_call_outlasts_a_frozen_host(frozen: TCPStore) -> None:
    for call in CALLS.values():
        store = JobStore(PrefixStore("a", frozen), SHORT)
        for _ in range(2):
            with pytest.raises(PeerLostError, match=r"did not answer within 0\.5 s.*worker 0"):
                call(store)


def test_processes_agree_on_a_name_that_no_dead_attempt_had() -> None:
    native = HashStore()
    native.set("attempt", "dead")
    native.set("dead/taken", '["of a dead process", "of another"]')
    with ThreadPoolExecutor(3) as pool:  # process 0 comes last
        names = list(pool.map(lambda rank: agree(JobStore(native, LONG), rank, 3, LONG).name, [2, 1, 0]))
    assert len(set(names)) == 1 and names[0] != "dead"


def jobs(size: int, timeout: timedelta) -> list[StaticJob]:
    native = HashStore()
    made = [StaticJob(native, rank, size, timeout) for rank in range(size)]
    for job in made:
        job.next_stage()
    return made


def test_a_process_that_lives_is_waited_for_beyond_the_timeout() -> None:
    waits, comes = jobs(2, timedelta(seconds=0.3))
    waiting = threading.Thread(target=waits.barrier)
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive()
    comes.barrier()
    waiting.join(30)
    assert not waiting.is_alive()


def test_why_a_process_fails_is_heard_at_once_also_from_a_third_one() -> None:
    fails, hears, hears_of_it = jobs(3, LONG)
    fails.fail(ArithmeticError("no data today"))
    with pytest.raises(
        PeerAbortedError, match=r"Worker 0 \(host .*\) stopped: ArithmeticError: no data today"
    ) as first:
        hears.barrier()
    hears.fail(first.value)
    with pytest.raises(PeerAbortedError) as second:
        hears_of_it.wait_for({1: "never"})
    assert str(second.value) == str(first.value)


def test_who_has_left_is_waited_for_no_more() -> None:
    leaves, waits = jobs(2, LONG)
    leaves.leave()
    with pytest.raises(PeerLostError, match=r"Worker 0 .* has left"):
        waits.barrier()


def dying(rank: int) -> None:
    job = join_job(rank, 3, timedelta(seconds=2))
    job.next_stage()
    job.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    job.barrier()


def test_a_killed_process_is_named_by_all() -> None:
    outcomes = run_processes(dying, 3)
    assert outcomes[1].error == "killed"
    for rank in (0, 2):
        assert "PeerLostError: Worker 1 (host" in outcomes[rank].error and "no sign of life" in outcomes[rank].error


def test_a_process_lost_in_a_transfer_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_CHUNK", 64)
    gives, takes, fails = jobs(3, LONG)
    given = [torch.randn(100), torch.tensor(True), torch.randint(9, (3, 5), dtype=torch.int16)]
    taken = [torch.zeros_like(given[0]), None, torch.zeros_like(given[2])]
    sizes = [tensor.numel() * tensor.element_size() for tensor in given]
    with ThreadPoolExecutor(2) as pool:
        giving = pool.submit(Relay(gives, "a").give, given, [1, 2])
        taking = pool.submit(Relay(takes, "a").take, list(zip(taken, sizes, strict=True)))
        fails.wait_for({0: "a/chunk/0"})
        fails.fail(ArithmeticError("enough"))
        taking.result(30)
        lost = giving.result(30)
    assert list(lost) == [2] and "Worker 2" in str(lost[2]) and "enough" in str(lost[2])
    for one, other in ((given[0], taken[0]), (given[2], taken[2])):
        assert other is not None and torch.equal(one, other)
    assert not gives.calls.check(["a/chunk/6"])

"""The end of a failed run: all workers raise the first error, in every state of the exchange and the store."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed import HashStore

from lightning_async_localsgd import PeerAbortedError, PeerLostError, Settings
from lightning_async_localsgd.codecs.floats import FP32
from lightning_async_localsgd.exchange.causes import Causes
from lightning_async_localsgd.membership import Roster
from tests.processes import run_processes
from tests.worker.test_worker import Loop

SECOND = timedelta(seconds=1)


def causes(store: Any, rank: int) -> Causes:
    return Causes(store, Roster(rank, ["a", "b", "c"]), SECOND)


def test_all_raise_the_first_cause() -> None:
    store = HashStore()
    first = causes(store, 0).first(ZeroDivisionError("by nothing"))
    assert isinstance(first, ZeroDivisionError)
    later = causes(store, 2).first(PeerLostError("Worker 0 is gone", gone=0))
    assert isinstance(later, PeerAbortedError)
    assert str(later) == "Worker 0 (host a) stopped: ZeroDivisionError: by nothing"


def test_who_waits_for_one_that_waits_itself_names_the_silent_one() -> None:
    store = HashStore()
    store.set("waits-for/1", "2")
    found = causes(store, 0).first(PeerLostError("Worker 1 did not answer", silent=1))
    assert isinstance(found, PeerLostError) and found.silent == 2


@pytest.mark.parametrize(
    "cause", ["", "not JSON", "[]", '["PeerLostError"]', '["SystemExit", "x"]', '["PeerLostError", 7]', '["x", "y"]']
)
def test_a_cause_that_cannot_be_read_leaves_the_error_at_hand(cause: str) -> None:
    store = HashStore()
    store.set("cause", cause)
    own = PeerLostError("Worker 1 is gone", gone=1)
    assert causes(store, 0).first(own) is own


def test_who_waits_for_nonsense_leaves_the_error_at_hand() -> None:
    store = HashStore()
    store.set("waits-for/1", "nobody")
    own = PeerLostError("Worker 1 did not answer", silent=1)
    assert causes(store, 0).first(own) is own


class Broken(HashStore):
    """A store that is gone."""

    def set(self, *args: Any) -> Any:
        raise RuntimeError("Connection reset by peer")

    check = compare_set = set


def test_without_a_store_its_host_is_named_unless_the_error_is_of_this_worker_alone() -> None:
    met = PeerLostError("Worker 2 (host c) is gone", gone=2)
    lost = causes(Broken(), 1).first(met)
    assert isinstance(lost, PeerLostError) and "Worker 0 (host a)" in str(lost) and str(met) in str(lost)
    own = ZeroDivisionError("by nothing")
    assert causes(Broken(), 1).first(own) is own


# ---- in real processes ----------------------------------------------------------------------------------------------


class Holding(FP32):
    """Holds up the deltas of one worker, while the others wait for them, until a file is there."""

    def __init__(self, folder: Path, holds: bool) -> None:
        vars(self).update(_begun=folder / "begun", _over=folder / "over", _holds=holds)  # it is frozen

    @property
    def begun(self) -> Path:
        return vars(self)["_begun"]

    @property
    def over(self) -> Path:
        return vars(self)["_over"]

    def encode(self, chunk: Tensor, out: Tensor | None = None) -> Tensor:
        if vars(self)["_holds"]:
            self.begun.touch()
            while not self.over.exists():
                time.sleep(0.01)
        return super().encode(chunk, out)


def failing_during_a_transfer(rank: int, size: int, folder: Path) -> Any:
    codec = Holding(folder, holds=rank == 1)
    loop = Loop(rank, size, Settings(local_steps=5, codec=codec, timeout=timedelta(minutes=5)), pause=0.002)

    def fail(loop: Loop) -> None:
        if rank == 0 and codec.begun.exists():
            raise ZeroDivisionError("a bug in the user's code")

    try:
        return loop.run(100_000, fail)
    except ZeroDivisionError as error:
        loop.worker.abort(error)
        codec.over.touch()
        raise


def test_a_worker_that_fails_during_a_long_transfer_says_why_and_leaves(tmp_path: Path) -> None:
    outcomes = run_processes(failing_during_a_transfer, 3, 3, tmp_path, timeout=40)
    assert outcomes[0].exitcode == 1 and "ZeroDivisionError" in outcomes[0].error
    for outcome in outcomes[1:]:
        assert outcome.exitcode == 1
        assert "PeerAbortedError" in outcome.error and "Worker 0 (host " in outcome.error
        assert "a bug in the user's code" in outcome.error


def frozen_while_all_train(rank: int, size: int) -> Any:
    settings = Settings(local_steps=100_000, timeout=timedelta(seconds=4))

    def freeze(loop: Loop) -> None:
        if rank == 0 and loop.worker.local_steps == 13:
            os.kill(os.getpid(), signal.SIGSTOP)

    return Loop(rank, size, settings, pause=0.002).run(10**6, freeze)


def test_a_frozen_worker_is_noticed_though_nobody_has_anything_to_send() -> None:
    outcomes = run_processes(frozen_while_all_train, 3, 3, timeout=40, lost=[0])
    for outcome in outcomes[1:]:
        assert outcome.exitcode == 1
        assert "Worker 0 (host " in outcome.error and "did not answer within 4 s" in outcome.error

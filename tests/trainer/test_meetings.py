"""Before the first step and after the last one processes wait for each other: patiently, and never in vain."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import Batches, Regression, make_trainer, regression_data, stream
from tests.processes import results, run_processes

LONG = 120.0
"""A timeout that no test outlasts: problems are noticed at once."""


def make(size: int, timeout: float, **kwargs: Any) -> L.Trainer:
    strategy = AsyncLocalSGDStrategy(local_steps=3, timeout=timedelta(seconds=timeout))
    return make_trainer(size, strategy, **({"max_steps": 12} | kwargs))


class Fails(Regression):
    """One rank raises in a hook."""

    def __init__(self, rank: int, hook: str) -> None:
        super().__init__()
        self.failing = (rank, hook)

    def _pass(self, hook: str) -> None:
        if self.failing == (int(os.environ["RANK"]), hook):
            raise ArithmeticError(f"no {hook} today")

    def prepare_data(self) -> None:
        self._pass("prepare_data")

    def setup(self, stage: str) -> None:
        self._pass("setup")

    def configure_optimizers(self) -> Any:
        self._pass("configure_optimizers")
        return super().configure_optimizers()

    def train_dataloader(self) -> Any:
        self._pass("train_dataloader")
        return stream(0)


def failing(rank: int, failing_rank: int, hook: str) -> None:
    make(2, LONG).fit(Fails(failing_rank, hook))


@pytest.mark.parametrize(
    ("rank", "hook"),
    [(0, "prepare_data"), (1, "setup"), (1, "configure_optimizers"), (0, "train_dataloader"), (1, "train_dataloader")],
)
def test_an_error_before_the_first_step_is_everyones_at_once(rank: int, hook: str) -> None:
    outcomes = run_processes(failing, 2, rank, hook)
    assert outcomes[rank].error.startswith(f"ArithmeticError: no {hook} today")
    other = outcomes[1 - rank].error
    assert "PeerAbortedError" in other and f"Worker {rank} (host" in other
    assert f"ArithmeticError: no {hook} today" in other


class Slow(Regression):
    """Worker 0 prepares its data, and validates before the training, for longer than the timeout."""

    def prepare_data(self) -> None:
        time.sleep(7.0)

    def validation_step(self, *args: Any) -> None:
        if self.trainer.sanity_checking:
            time.sleep(7.0)


def slow(rank: int) -> int:
    trainer = make(2, 5.0, num_sanity_val_steps=1)
    trainer.fit(Slow((0.01,)), stream(rank), DataLoader(regression_data(8), batch_size=8))
    return trainer.strategy.summary.total_local_steps  # type: ignore[attr-defined, no-any-return]


def test_preparations_may_take_longer_than_the_timeout() -> None:
    assert results(run_processes(slow, 2)) == [24, 24]


class Counting(L.Callback):
    """Counts the connections of this process to the job's store."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.counts.append(0)
        for name in os.listdir("/dev/fd"):
            with suppress(OSError):
                if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                    with socket.socket(fileno=os.dup(int(name))) as opened:
                        self.counts[-1] += opened.getpeername()[1] == int(os.environ["MASTER_PORT"])


def connected(rank: int) -> list[int]:
    count = Counting()
    make(2, LONG, callbacks=[count]).fit(Regression((0.01,)), DataLoader(regression_data(256), batch_size=8))
    return count.counts


def test_a_worker_opens_few_connections_to_the_store() -> None:
    """For each one libtorch's store looks up a name, and answers nobody meanwhile."""
    for counts in results(run_processes(connected, 2)):
        assert len(counts) >= 2 and 1 <= max(counts) <= 3  # for calls, for the bell and for the group of all workers


class Pieces(IterableDataset[Any]):
    """A finite stream, which gives nothing the second time, or nothing at all."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __iter__(self) -> Iterator[Any]:
        while self.left > 0:
            self.left -= 1
            yield next(iter(Batches(self.left)))


def starving(rank: int, kind: str) -> None:
    if kind == "loader":
        data: Any = DataLoader(regression_data(3 if rank else 64), batch_size=4, drop_last=True)
        trainer = make(2, LONG, use_distributed_sampler=False)
    else:
        data = DataLoader(Pieces(3 if kind == "one-shot" else 0), batch_size=None) if rank else stream(rank)
        trainer = make(2, LONG, max_steps=50)
    trainer.fit(Regression(), data)


def test_an_empty_loader_of_one_worker_is_named_on_all() -> None:
    other, starved = run_processes(starving, 2, "loader")
    assert "within local rank has zero length" in starved.error  # Lightning finds it, for lengths are of the whole job
    assert "Worker 1 (host" in other.error and "within local rank has zero length" in other.error


@pytest.mark.parametrize("kind", ["one-shot", "empty"])
def test_a_stream_that_gives_no_more_is_named_on_all(kind: str) -> None:
    other, starved = run_processes(starving, 2, kind)
    assert "The training data of worker 1 gave no batch" in starved.error
    assert "PeerAbortedError" in other.error and "worker 1 gave no batch" in other.error


class Ends(Regression):
    """Worker 0 ends with other parameters than the rest; one rank is killed when all training is done."""

    def __init__(self, victim: int) -> None:
        super().__init__((0.01,))
        self.victim = victim

    def on_fit_end(self) -> None:
        if self.trainer.global_rank == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trainer.global_rank == 0:
            with torch.no_grad():
                self.net[0].bias.fill_(0.25)


def ending(rank: int, victim: int) -> tuple[list[float], list[str]]:
    module, trainer = Ends(victim), make(3, 10.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, stream(rank))
    assert trainer.state.finished
    return module.net[0].bias.tolist(), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_worker_killed_after_the_last_update_fails_no_other_one(victim: int) -> None:
    outcomes = run_processes(ending, 3, victim)
    assert outcomes[victim].error == "killed"
    survivors = [rank for rank in range(3) if rank != victim]
    ends = dict(zip(survivors, results([outcomes[rank] for rank in survivors]), strict=True))
    for rank in survivors:
        assert any(f"Worker {victim} (host" in text for text in ends[rank][1])
    if victim:
        assert all(set(bias) == {0.25} for bias, _ in ends.values())

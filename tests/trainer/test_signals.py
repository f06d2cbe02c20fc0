"""A signal handler that saves a checkpoint finds the worker between two local steps."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.trainer.signals import HeldSignals, saving_signals
from lightning_async_localsgd.worker.replica import Replica
from tests.modules import Regression, make_trainer, stream
from tests.processes import results, run_processes


@pytest.fixture
def received() -> Any:
    """The signals that a handler of SIGUSR1 has received."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGUSR1, before)


def test_a_handler_runs_when_nothing_is_held_and_else_at_the_end(received: list[int]) -> None:
    signals = HeldSignals([signal.SIGUSR1])
    signal.raise_signal(signal.SIGUSR1)
    assert len(received) == 1
    with signals.held():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert len(received) == 1
    assert len(received) == 3


def test_what_is_released_has_its_handler_again_unless_there_is_a_newer_one(received: list[int]) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    signals = HeldSignals([signal.SIGUSR1, signal.SIGUSR2])
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    signals.release()
    assert signal.getsignal(signal.SIGUSR1) is before
    signals = HeldSignals([signal.SIGUSR1])
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signals.release()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_the_requeue_signal_of_slurm_is_one_of_them() -> None:
    assert saving_signals(LightningEnvironment()) == {signal.SIGUSR1, signal.SIGUSR2}
    assert signal.SIGHUP in saving_signals(SLURMEnvironment(requeue_signal=signal.SIGHUP))


def save_on_a_signal(rank: int, path: str) -> tuple[list[int], int]:
    """Worker 0 receives a signal in the middle of an adoption, and its handler saves a checkpoint."""
    adopt, saved, interruptions = Replica.adopt, [], []
    trainer = make_trainer(2, AsyncLocalSGDStrategy(local_steps=4), max_steps=24)

    def save(number: int, frame: Any) -> None:
        trainer.save_checkpoint(path)
        saved.append(trainer.global_step)

    def interrupted(replica: Replica, adoption: Any, steps: int) -> None:
        if rank == 0 and not interruptions:
            interruptions.append(replica)
            signal.raise_signal(signal.SIGUSR1)
        adopt(replica, adoption, steps)

    signal.signal(signal.SIGUSR1, save)
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(Replica, "adopt", interrupted)
        trainer.fit(Regression(), stream(rank))
    return saved, trainer.strategy.summary.total_local_steps  # type: ignore[attr-defined]


def test_a_handler_that_saves_is_not_run_in_the_middle_of_an_adoption(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    (saved, total), (_, other) = results(run_processes(save_on_a_signal, 2, str(path)))
    assert total == other == 48
    assert len(saved) == 1
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == saved[0]

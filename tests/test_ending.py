"""An interrupt, a signal or an error in one worker ends all workers, and leaves the checkpoint that was asked for."""

from __future__ import annotations

import os
import signal
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_async_localsgd import AsyncLocalSGDStrategy, PeerAbortedError
from tests.modules import Regression, make_trainer, stream
from tests.processes import run_processes


class Ending(Regression):
    """Ends in its own way at the twentieth step of one rank."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__((0.002, 0.005))
        self.rank = rank
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 20 and self.trainer.global_rank == self.rank:
            if self.how == "interrupt":
                raise KeyboardInterrupt
            if self.how == "error":
                raise ArithmeticError("a bad batch")
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def ending(rank: int, size: int, where: int, how: str, folder: str) -> None:
    save = ModelCheckpoint(dirpath=folder, filename="last-words", save_on_exception=True, every_n_train_steps=10**6)
    plan = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    trainer = make_trainer(size, plan, max_steps=10**6, callbacks=[save], enable_checkpointing=True)
    try:
        trainer.fit(Ending(where, how), stream(rank))
    except PeerAbortedError as error:
        frames = "".join(traceback.format_exception(error))
        raise AssertionError(f"{error}|{'exchange/thread.py' in frames}|{'During handling' in frames}") from None


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("how", ["interrupt", "terminate", "error"])
def test_one_worker_ends_all_and_the_last_checkpoint_is_written(where: int, how: str, tmp_path: Path) -> None:
    outcomes = run_processes(ending, 2, 2, where, how, str(tmp_path))
    names = {"interrupt": "KeyboardInterrupt", "terminate": "SIGTERMException", "error": "a bad batch"}
    own, other = outcomes[where], outcomes[1 - where]
    assert own.exitcode == (0 if how == "terminate" else 1)  # Lightning lets a process end as it was told to
    assert ("SystemExit" if how == "interrupt" else names[how]) in own.error
    assert f"Worker {where}" in other.error and names[how] in other.error
    assert "|False|False" in other.error  # nothing of the exchange thread on top of it
    saved = torch.load(tmp_path / "last-words.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Regression().state_dict().keys()
    assert saved["async_localsgd"]["job_steps"] > 0

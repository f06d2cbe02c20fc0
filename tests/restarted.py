"""A job that loses a worker in each of its first two attempts and goes on from its last checkpoint; see its test."""

from __future__ import annotations

import os
import random
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import Regression, make_trainer, regression_data

SAMPLES, EPOCHS, DEATHS = 60, 2, 2
VICTIMS = (1, 0)
"""The rank that is killed in each attempt."""


class Lineage(L.Callback):
    """Which samples this worker has trained, by epoch: what an attempt trains in vain is not among them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.trained: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.trained += [[trainer.current_epoch, index] for index in batch[2].tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "trained": [list(item) for item in self.trained]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["rank"] == self.rank:  # else this worker has no side of the checkpoint: it begins as worker 0 was
            self.trained = state_dict["trained"]


class Killed(L.Callback):
    """Kills the process at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step -= 1
        if self.step < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def train(rank: int, attempt: int, folder: str) -> tuple[list[list[int]], int]:
    """One attempt; returns what this worker has trained, and the updates of the global model."""
    lineage = Lineage(rank)
    save = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_last=True)
    callbacks: list[L.Callback] = [lineage, save]
    if attempt < DEATHS and VICTIMS[attempt] == rank:
        callbacks.append(Killed(random.randint(4, 10)))
    strategy = AsyncLocalSGDStrategy(local_steps=3, timeout=timedelta(seconds=20))
    trainer = make_trainer(
        2, strategy, max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=True, default_root_dir=folder
    )
    data = DataLoader(regression_data(SAMPLES), batch_size=2, shuffle=True)
    trainer.fit(Regression((0.005, 0.008)), data, ckpt_path="last")
    assert strategy.summary is not None
    return lineage.trained, strategy.summary.version


if __name__ == "__main__":
    own = int(os.environ["RANK"])
    trained, _ = train(own, int(os.environ["TORCHELASTIC_RESTART_COUNT"]), sys.argv[1])
    Path(sys.argv[1], f"trained-{own}").write_text(repr(trained))

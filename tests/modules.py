"""Small modules and data that the tests train."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests import pacing

FEATURES = 8
SPEEDS = (0.58, 0.75, 1.51, 3.33)
"""Seconds per step of the devices in the paper's toy (Liu et al. 2024)."""


def make_net(seed: int = 0) -> nn.Sequential:
    """A two-layer net with the same weights for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 1))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """An endless stream of batches of a regression task: the stream of ``seed``, always the same."""

    def __init__(self, seed: int, batch_size: int = 4) -> None:
        self.seed = seed
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            x = torch.randn(self.batch_size, FEATURES, generator=generator)
            yield x, x.sin().sum(1, keepdim=True)


def regression_data(samples: int = 256, seed: int = 0) -> TensorDataset:
    """A finite data set of the same task; the first feature of each sample is its index."""
    x, y = next(iter(Batches(seed, samples)))
    return TensorDataset(x, y, torch.arange(samples))


class Regression(L.LightningModule):
    """Fits the task with AdamW; a step of each rank takes ``pauses[rank]`` seconds."""

    def __init__(self, pauses: Sequence[float] = (0.0,), seed: int = 0, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = make_net(seed)
        self.pauses = tuple(pauses)
        self.lr = lr
        self.seen: list[int] = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        pacing.step(self.pauses[self.trainer.global_rank % len(self.pauses)])
        if len(batch) > 2:
            self.seen += batch[2].tolist()
        return self.loss(batch)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr)


class Record(L.Callback):
    """Keeps every outer update, and when this worker's own steps took place."""

    def __init__(self) -> None:
        self.updates: list[Any] = []
        self.last_step = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        self.last_step = time.monotonic()

    def on_outer_update(self, trainer: L.Trainer, pl_module: L.LightningModule, update: Any) -> None:
        self.updates.append(update)


def make_trainer(devices: int, strategy: AsyncLocalSGDStrategy, **kwargs: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, **(quiet | kwargs))


def stream(rank: int, batch_size: int = 4) -> DataLoader[tuple[Tensor, Tensor]]:
    """The endless loader of one rank."""
    return DataLoader(Batches(100 + rank, batch_size), batch_size=None)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints named ``{step}``, in the order of the job's steps."""
    return sorted(Path(folder).glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run that all workers have written, in the order in which worker 0 has saved them."""
    # Their ids end with a number; the files' times are too coarse to tell two apart that become complete together.
    manifests = sorted(Path(folder).glob("*.workers/*/manifest.json"), key=lambda p: int(p.parent.name.split("-")[-1]))
    return [Path(folder, m.parents[1].name.removesuffix(".workers")) for m in manifests]

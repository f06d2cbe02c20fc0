"""Resumed runs: each worker's own data and random numbers, the current settings, other strategies' files."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_async_localsgd import AsyncLocalSGD, AsyncLocalSGDStrategy
from tests.modules import FEATURES, Regression, make_trainer, regression_data
from tests.processes import results, run_processes


def lockstep(**settings: Any) -> AsyncLocalSGDStrategy:
    plan: dict[str, Any] = {"local_steps": 10, "quorum": 2, "pace": "fixed", "overlap": False, "grace_period": 0.0}
    return AsyncLocalSGDStrategy(**(plan | settings), timeout=timedelta(seconds=30))


class Dropout(Regression):
    """Draws from the global generators in each step, and notes the first feature of what it trains on."""

    def __init__(self, pauses: tuple[float, ...] = (0.0,)) -> None:
        super().__init__(pauses)
        self.dropout = nn.Dropout(0.3)
        self.batches: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append(float(batch[0].sum()))
        noise = random.random() + float(np.random.rand())
        return super().training_step((self.dropout(batch[0]) + noise, batch[1]), batch_idx)


class Augmented(Dataset[Any]):
    """Each sample is drawn with global random numbers."""

    def __init__(self) -> None:
        self.data = regression_data(80)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y, _ = self.data[index]
        return x + torch.randn(FEATURES) * random.random() + float(np.random.rand()), y


class Stream(IterableDataset[Any]):
    """An endless stream of a rank's own, augmented by global random numbers; knows how far it has been read."""

    def __init__(self, rank: int, batch_size: int = 4) -> None:
        self.name = f"files of rank {rank}"
        self.batch_size = batch_size
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            generator = torch.Generator().manual_seed(sum(self.name.encode()) + 1000 * self.read)
            x = torch.randn(self.batch_size, FEATURES, generator=generator) + torch.rand(1)
            self.read += 1
            yield x, x.sin().sum(1, keepdim=True)


class StatefulLoader(DataLoader[Any]):
    """A loader with the interface of torchdata's ``StatefulDataLoader``."""

    def state_dict(self) -> dict[str, Any]:
        assert isinstance(self.dataset, Stream)
        return {"name": self.dataset.name, "read": self.dataset.read}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert isinstance(self.dataset, Stream)
        self.dataset.name, self.dataset.read = state_dict["name"], state_dict["read"]


def make_loader(kind: str, rank: int) -> DataLoader[Any]:
    if kind == "stream":
        return StatefulLoader(Stream(rank), batch_size=None)
    return DataLoader(Augmented(), batch_size=2, shuffle=True)


def train(
    rank: int, size: int, folder: str, ckpt: str | None, kind: str, limits: dict[str, Any], worker_size: int = 1
) -> Any:
    torch.manual_seed(100 * rank + 7)  # worker 1's own random numbers
    random.seed(rank)
    np.random.seed(rank)
    module, plan = Dropout((0.004, 0.0) if worker_size == 1 else (0.0,)), lockstep(worker_size=worker_size)
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=13, save_top_k=-1)
    trainer = make_trainer(size, plan, callbacks=[save], enable_checkpointing=True, **limits)
    trainer.fit(module, make_loader(kind, rank), ckpt_path=ckpt)
    return module.batches, nn.utils.parameters_to_vector(module.parameters()).tolist(), plan.summary


@pytest.mark.parametrize(
    ("kind", "limits"),
    [("stream", {"max_steps": 40}), ("augmented", {"max_epochs": 2}), ("augmented", {"max_steps": 40})],
)
def test_random_numbers_and_places_go_on_bit_for_bit(tmp_path: Path, kind: str, limits: dict[str, Any]) -> None:
    first = results(run_processes(train, 2, 2, str(tmp_path), None, kind, limits))
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert len(paths) >= 2
    for path in paths[:2]:
        again = results(run_processes(train, 2, 2, str(tmp_path / "again"), str(path), kind, limits))
        for (batches, values, summary), (after, resumed, resumed_summary) in zip(first, again, strict=True):
            assert 0 < len(after) < len(batches) and batches[-len(after) :] == after
            assert resumed == values and resumed_summary.digest == summary.digest


def test_each_device_of_a_worker_goes_on_with_its_own(tmp_path: Path) -> None:
    limits = {"max_steps": 26}
    first = results(run_processes(train, 4, 4, str(tmp_path), None, "stream", limits, 2))
    again = results(
        run_processes(train, 4, 4, str(tmp_path / "again"), str(tmp_path / "step=13.ckpt"), "stream", limits, 2)
    )
    for (batches, values, _), (after, resumed, _) in zip(first, again, strict=True):
        assert 0 < len(after) < len(batches) and batches[-len(after) :] == after and resumed == values


def back(folder: str, ckpt: str | None, limits: dict[str, Any], loader: DataLoader[Any]) -> Any:
    """Train on one device, without this library's strategy."""
    module = Dropout()
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=13, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[save], enable_progress_bar=False, **limits
    )
    trainer.fit(module, loader, ckpt_path=ckpt)
    return trainer.global_step


@pytest.mark.parametrize("kind", ["stream", "augmented"])
def test_lightnings_other_strategies_go_on_from_a_checkpoint_and_give_one(tmp_path: Path, kind: str) -> None:
    limits = {"max_steps": 30} if kind == "stream" else {"max_epochs": 1}
    results(run_processes(train, 2, 2, str(tmp_path), None, kind, limits))
    mid_epoch = str(next(tmp_path.glob("*13.ckpt")))
    assert back(str(tmp_path / "back"), mid_epoch, {"max_steps": 50}, make_loader(kind, 0)) == 50
    theirs = str(next((tmp_path / "back").glob("*26.ckpt")))
    ends = results(run_processes(train, 2, 2, str(tmp_path / "again"), theirs, kind, {"max_steps": 40}))
    assert ends[0][1] == ends[1][1] and ends[0][2].total_local_steps == 2 * (40 - 26)


def resume(rank: int, size: int, folder: str, ckpt: str | None, settings: dict[str, Any]) -> Any:
    module, plan = Regression(), lockstep(**settings)
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=15, save_top_k=-1)
    trainer = make_trainer(size, plan, callbacks=[save], enable_checkpointing=True, max_steps=30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, StatefulLoader(Stream(rank), batch_size=None), ckpt_path=ckpt)
    return [str(w.message) for w in caught if "settings of now" in str(w.message)], plan.summary


def test_settings_that_differ_from_those_of_the_checkpoint_are_told_once(tmp_path: Path) -> None:
    results(run_processes(resume, 2, 2, str(tmp_path), None, {}))
    path = str(tmp_path / "step=15.ckpt")
    same = results(run_processes(resume, 2, 2, str(tmp_path / "same"), path, {}))
    assert [told for told, _ in same] == [[], []]
    ends = results(run_processes(resume, 2, 2, str(tmp_path / "again"), path, {"local_steps": 5}))
    assert len(ends[0][0]) == 1 and ends[1][0] == []
    assert "`local_steps` was 10 and is 5" in ends[0][0][0]
    assert ends[0][1].version == 1 + 4 and ends[0][1].digest == ends[1][1].digest


def plain_loop(rank: int, folder: str, ckpt: bool) -> Any:
    torch.manual_seed(rank)
    random.seed(rank)

    def save(name: str, state: dict[str, Any]) -> None:
        torch.save(state, f"{folder}/{name}-{rank}.pt")

    module = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(module.parameters())
    job = AsyncLocalSGD(
        module, optimizer, max_steps=40, on_checkpoint=save, local_steps=10, quorum=2, pace="fixed", overlap=False
    )
    if ckpt:
        job.load_state_dict(torch.load(f"{folder}/one-{rank}.pt", weights_only=True))
    with job:
        while job.running:
            x = torch.randn(4, FEATURES) + random.random()
            nn.functional.mse_loss(module(x), x.sum(1, keepdim=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0 and job.worker.local_steps == 17 and not ckpt:
                job.checkpoint("one")
    assert job.summary is not None
    return nn.utils.parameters_to_vector(module.parameters()).tolist(), job.summary.digest


def test_a_plain_loop_goes_on_with_its_random_numbers(tmp_path: Path) -> None:
    first = results(run_processes(plain_loop, 2, str(tmp_path), False))
    assert results(run_processes(plain_loop, 2, str(tmp_path), True)) == first

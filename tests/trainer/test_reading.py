"""Data is divided by rank and size as under DDP, no worker waits for another, and equal data is noticed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info

from tests.modules import Batches, Regression, make_trainer, regression_data
from tests.processes import results, run_processes
from tests.trainer.test_strategy import strategy

SAMPLES = 64


class Streamed(IterableDataset[Any]):
    """Divides itself among processes as streaming libraries do: by the default process group, where there is one."""

    def __init__(self, made: bool = False) -> None:
        self.data = regression_data(SAMPLES)
        self.at_making = self.detect() if made else None

    def detect(self) -> tuple[int, int]:
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def __iter__(self) -> Iterator[Any]:
        rank, size = self.at_making or self.detect()
        info = get_worker_info()
        readers = 1 if info is None else info.num_workers
        reader = 0 if info is None else info.id
        for index in range(rank * readers + reader, SAMPLES, size * readers):
            yield self.data[index]


class Seeing(Regression):
    """Keeps what validation sees, and the process group that a step finds."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__((0.0, 0.005))
        self.loader = loader
        self.validated: list[int] = []
        self.groups: set[bool] = set()

    def train_dataloader(self) -> Any:
        return self.loader()

    def val_dataloader(self) -> Any:
        data = regression_data(8)
        return DataLoader(data, sampler=DistributedSampler(data, shuffle=False), batch_size=4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.groups.add(dist.is_initialized())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert dist.get_rank() == 0 and dist.get_world_size() == 1
        self.validated += batch[2].tolist()
        super().validation_step(batch, batch_idx)


def by_stream() -> Any:
    return DataLoader(Streamed(), batch_size=4)


def by_stream_in_processes() -> Any:
    return DataLoader(Streamed(), batch_size=4, num_workers=2, multiprocessing_context="fork")


def by_what_was_known_at_making() -> Any:
    return DataLoader(Streamed(made=True), batch_size=4)


def by_sampler() -> Any:
    data = regression_data(SAMPLES)
    return DataLoader(data, sampler=DistributedSampler(data, shuffle=False), batch_size=4)


def dividing(rank: int, loader: Any) -> Any:
    module = Seeing(loader)
    trainer = make_trainer(
        2, strategy(), max_epochs=2, use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    same = [str(w.message) for w in caught if "same batches" in str(w.message)]
    return module.seen, module.validated, module.groups, same


@pytest.mark.parametrize("loader", [by_stream, by_stream_in_processes, by_what_was_known_at_making, by_sampler])
def test_data_that_asks_the_default_group_is_divided_among_all(loader: Any) -> None:
    ends = results(run_processes(dividing, 2, loader))
    seen = [sorted(set(end[0])) for end in ends]
    assert sorted(seen[0] + seen[1]) == list(range(SAMPLES))
    assert all(len(end[0]) == SAMPLES for end in ends)  # two passes over a half
    assert set(ends[0][1]) == set(range(8)) and ends[1][1] == []
    assert all(end[2] == {False} for end in ends)
    assert all(not end[3] for end in ends)


class Asking(Regression):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def train_dataloader(self) -> Any:
        return DataLoader(Reducing() if self.where == "data" else Batches(self.trainer.global_rank), batch_size=None)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.where == "step":
            dist.get_rank()
        if self.where == "collective":
            dist.all_reduce(torch.zeros(1))
        return super().training_step(batch, batch_idx)


class Reducing(IterableDataset[Any]):
    """Wants to wait for the others in the middle of its stream."""

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(Batches(dist.get_rank())):
            if number == 3:
                dist.all_reduce(torch.zeros(1))
            yield batch


def asking(rank: int, where: str) -> None:
    make_trainer(2, strategy(), max_steps=20).fit(Asking(where))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("step", "`torch.distributed` has no process group while workers train"),
        ("collective", "`trainer.global_rank` and `trainer.world_size`"),
        ("data", "A collective of `torch.distributed` was called while training data is made or read"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_way_out(where: str, message: str) -> None:
    assert any(message in outcome.error for outcome in run_processes(asking, 2, where))


def same_for_all(rank: int, meant: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(2, strategy(same_data=meant), max_steps=10)
        trainer.fit(Regression(), DataLoader(Batches(7), batch_size=None))
    return [str(w.message) for w in caught if "same batches" in str(w.message)]


def test_workers_that_train_on_the_same_data_are_named_once() -> None:
    told = [text for end in results(run_processes(same_for_all, 2, False)) for text in end]
    assert len(told) == 1 and ("Processes 0 and 1 train" in told[0] or "Processes 1 and 0 train" in told[0])
    assert results(run_processes(same_for_all, 2, True)) == [[], []]


class Looking(Callback):
    """Goes through the training data in a hook, as for its mean."""

    def __init__(self) -> None:
        self.looked: dict[str, list[int]] = {}

    def look(self, hook: str, trainer: Any) -> None:
        self.looked[hook] = [i for batch in trainer.train_dataloader for i in batch[2].tolist()]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.look("on_train_start", trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look("on_train_epoch_end", trainer)


class Validating(Regression):
    def __init__(self) -> None:
        super().__init__((0.0, 0.005))
        self.validated: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += batch[2].tolist()
        super().validation_step(batch, batch_idx)


def looking(rank: int, limit: dict[str, int]) -> Any:
    module, looking = Validating(), Looking()
    trainer = make_trainer(2, strategy(), callbacks=[looking], **limit)
    trainer.fit(module, DataLoader(regression_data(SAMPLES), batch_size=4, shuffle=True))
    metrics = trainer.validate(module, trainer.train_dataloader, verbose=False)
    return module.seen, looking.looked, module.validated, metrics


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 8}], ids=["leases", "shards"])
def test_who_looks_at_the_training_data_takes_nothing_from_it(limit: dict[str, int]) -> None:
    ends = results(run_processes(looking, 2, limit))
    if "max_epochs" in limit:
        assert sorted(ends[0][0] + ends[1][0]) == list(range(SAMPLES))
    for hook in ("on_train_start", "on_train_epoch_end"):
        parts = [end[1][hook] for end in ends]
        assert all(len(part) == len(set(part)) == SAMPLES // 2 for part in parts)
        assert sorted(parts[0] + parts[1]) == list(range(SAMPLES))
    assert sorted(ends[0][2] + ends[1][2]) == list(range(SAMPLES))
    assert ends[0][3] == ends[1][3]

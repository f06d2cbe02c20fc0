"""Workers of two processes: plain DDP inside, the exchange by the first rank, adoption by both at the same step."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import FEATURES, Regression, make_trainer, regression_data, stream
from tests.processes import results, run_processes


def parameters(module: nn.Module) -> list[float]:
    return nn.utils.parameters_to_vector(module.parameters()).tolist()


class Normalized(Regression):
    """With BatchNorm and dropout-free, so that equal parameters stay equal."""

    def __init__(self, pauses: Any) -> None:
        super().__init__(pauses)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.own: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(self.norm(batch[0])), batch[1])


class Compare(L.Callback):
    """After every step both ranks of a worker hold the same parameters, and have adopted as many updates."""

    def __init__(self) -> None:
        self.equal: list[bool] = []
        self.updates: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        assert isinstance(trainer.strategy.model, DistributedDataParallel)
        assert dist.get_world_size() == 2
        own = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        other = own.clone()
        dist.broadcast(other, src=0)
        self.equal.append(torch.equal(own, other))

    def on_outer_update(self, trainer: L.Trainer, pl_module: L.LightningModule, update: Any) -> None:
        self.updates.append(update.version)


PAUSES = (0.01, 0.01, 0.04, 0.04)


def strategy(**kwargs: Any) -> AsyncLocalSGDStrategy:
    return AsyncLocalSGDStrategy(local_steps=5, worker_size=2, timeout=timedelta(seconds=30), **kwargs)


def fit(rank: int, size: int, folder: str) -> Any:
    module, plan, compare = Normalized(PAUSES), strategy(find_unused_parameters=True, fragments=2), Compare()
    trainer = make_trainer(
        size,
        plan,
        max_steps=40,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        callbacks=[compare, ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=15, save_top_k=-1)],
        enable_checkpointing=True,
    )
    trainer.fit(module, stream(rank), DataLoader(regression_data(20), batch_size=4))
    found_unused = plan._ddp_kwargs["find_unused_parameters"]
    return (
        plan.summary,
        parameters(module),
        compare.equal,
        compare.updates,
        float(trainer.callback_metrics["val_loss"]),
        (trainer.global_rank, plan.worker_rank, plan.device_rank, plan.workers, found_unused),
    )


def test_two_workers_of_two_processes(tmp_path: Path) -> None:
    ends = results(run_processes(fit, 4, 4, str(tmp_path)))
    first = ends[0][0]
    assert len(first.local_steps) == 2 and min(first.local_steps) > 0
    assert abs(first.total_local_steps - 80) <= 5
    for rank, (summary, values, equal, updates, val_loss, ranks) in enumerate(ends):
        assert summary.digest == first.digest and values == ends[0][1]
        assert summary.local_steps == first.local_steps
        assert equal == [True] * summary.local_steps[rank // 2]
        assert updates == ends[0][3] and updates[-1] == summary.version
        assert val_loss == ends[0][4]
        assert ranks == (rank, rank // 2, rank % 2, 2, True)


def lockstep_of_pairs(rank: int, size: int, worker_size: int) -> Any:
    plan = AsyncLocalSGDStrategy(
        local_steps=5,
        worker_size=worker_size,
        quorum=size // worker_size,
        pace="fixed",
        overlap=False,
        grace_period=0.0,
    )
    module = Regression([0.0])
    torch.manual_seed(0)
    data = [(batch[0], batch[1]) for batch in DataLoader(regression_data(8), batch_size=4)]

    class Same(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # Each device of a pair sees half of what a single worker sees: the mean of their gradients is its gradient.
            x, y = data[self.trainer.global_rank // worker_size]
            if worker_size > 1:
                half = slice(0, 2) if self.trainer.global_rank % 2 == 0 else slice(2, 4)
                x, y = x[half], y[half]
            return self.loss((x, y))

    module = Same([0.0])
    make_trainer(size, plan, max_steps=20).fit(module, stream(0))
    return parameters(module)


def test_a_pair_with_half_batches_equals_a_worker_with_the_whole_one() -> None:
    singles = results(run_processes(lockstep_of_pairs, 2, 2, 1))
    pairs = results(run_processes(lockstep_of_pairs, 4, 4, 2))
    assert all(values == pairs[0] for values in pairs)
    assert pairs[0] == pytest.approx(singles[0], abs=1e-5)


class Watched(Normalized):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.own += [(self.trainer.current_epoch, i) for i in batch[2].tolist()]
        return loss


def epochs(rank: int, size: int, folder: str, ckpt: str | None) -> Any:
    module, plan = Watched(PAUSES), strategy()
    notes: list[Any] = []

    class Note(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
            notes.append(list(pl_module.own))

    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=6, save_top_k=-1, save_last=True)
    trainer = make_trainer(size, plan, max_epochs=2, callbacks=[save, Note()], enable_checkpointing=True)
    trainer.fit(module, DataLoader(regression_data(80), batch_size=4, shuffle=True), ckpt_path=ckpt)
    return module.own, notes, plan.summary, parameters(module)


def test_epochs_are_shared_by_pairs_and_resumed(tmp_path: Path) -> None:
    first = results(run_processes(epochs, 4, 4, str(tmp_path), None))
    for epoch in range(2):
        samples = [i for own, *_ in first for e, i in own if e == epoch]
        assert sorted(samples) == list(range(80))
    checkpoint = next(
        p for p in sorted(tmp_path.glob("*.ckpt")) if next(Path(f"{p}.workers").glob("*/manifest.json"), 0)
    )
    again = results(run_processes(epochs, 4, 4, str(tmp_path / "again"), str(checkpoint)))
    assert all(values == again[0][3] and summary.digest == again[0][2].digest for *_, summary, values in again)
    assert len(again[0][0]) < len(first[0][0])


class Failing(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_rank == self.fails and self.trainer.global_step == 7:
            raise ArithmeticError("no more")
        return super().training_step(batch, batch_idx)


def failing(rank: int, size: int, fails: int) -> None:
    module = Failing(PAUSES)
    module.fails = fails
    make_trainer(size, strategy(), max_steps=10_000).fit(module, stream(rank))


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_a_process_that_fails_ends_all(fails: int) -> None:
    outcomes = run_processes(failing, 4, 4, fails)
    assert "no more" in outcomes[fails].error
    assert all(outcome.exitcode == 1 for outcome in outcomes)


def odd(rank: int, size: int) -> None:
    make_trainer(size, strategy(), max_steps=1).fit(Regression(), stream(rank))


def test_processes_that_do_not_make_workers_are_refused() -> None:
    for outcome in run_processes(odd, 3, 3):
        assert "3 processes do not make workers of `worker_size=2`" in outcome.error

"""Lightning's tuners: the learning-rate finder works, on worker 0's losses; the batch size finder is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.trainer.fit import Phase
from tests.modules import Regression, make_net, make_trainer, regression_data
from tests.processes import results, run_processes

STEPS = 40


class Watched(Regression):
    """Keeps what it starts to train with, once workers do."""

    def __init__(self) -> None:
        super().__init__((0.001, 0.005))
        self.batch_size = 4
        self.start: list[float] = []
        self.start_lr = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        if self.trainer.strategy._fit.phase is Phase.TRAINING and not self.start:
            self.start = parameters(self)
            self.start_lr = self.trainer.optimizers[0].param_groups[0]["lr"]

    def train_dataloader(self) -> Any:
        # Each worker has data of its own: on a finding of their own they would not agree.
        return DataLoader(regression_data(256, seed=self.trainer.global_rank), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(regression_data(8), batch_size=8)


def parameters(module: nn.Module) -> list[float]:
    return nn.utils.parameters_to_vector(module.parameters()).tolist()


class InTheMiddle(LearningRateFinder):
    """As Lightning's documentation has it: again at a later epoch."""

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def finding(rank: int, size: int, how: str, folder: str) -> Any:
    module, plan = Watched(), AsyncLocalSGDStrategy(local_steps=5)
    finder = {
        "callback": [LearningRateFinder(num_training_steps=STEPS)],
        "epoch": [InTheMiddle(num_training_steps=STEPS)],
        "batch size": [BatchSizeFinder()],
    }.get(how, [])
    limits: dict[str, Any] = {"max_epochs": 3} if how == "epoch" else {"max_steps": 30}
    trainer = make_trainer(size, plan, callbacks=finder, default_root_dir=folder, **limits)
    if how == "tuner":
        found = Tuner(trainer).lr_find(module, num_training=STEPS)
    trainer.fit(module)
    if how == "callback":
        found = finder[0].optimal_lr
    return module.lr, found.suggestion(), module.start_lr, module.start, plan.summary, parameters(module)


@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_all_workers_train_with_the_learning_rate_that_worker_0_has_found(how: str, tmp_path: Path) -> None:
    ends = results(run_processes(finding, 2, 2, how, str(tmp_path)))
    for lr, suggestion, start_lr, start, summary, end in ends:
        assert lr == suggestion == start_lr == ends[0][0] != 1e-2
        assert torch.equal(torch.tensor(start), torch.tensor(parameters(make_net())))  # what it tried is undone
        assert end == ends[0][5] != start
        assert summary.digest == ends[0][4].digest
        assert abs(summary.total_local_steps - 60) <= 5
    assert not list(tmp_path.glob(".lr_find*"))


def test_finding_a_learning_rate_while_workers_train_is_refused(tmp_path: Path) -> None:
    outcomes = run_processes(finding, 2, 2, "epoch", str(tmp_path))
    assert all(outcome.exitcode == 1 for outcome in outcomes)
    assert any("in `on_fit_start`" in outcome.error for outcome in outcomes)


def test_finding_a_batch_size_is_refused(tmp_path: Path) -> None:
    for outcome in run_processes(finding, 2, 2, "batch size", str(tmp_path)):
        assert "without this strategy" in outcome.error


class Sized(Regression):
    """With a batch size to find."""

    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(regression_data(64), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(regression_data(8), batch_size=4)


def test_a_batch_size_is_found_as_the_error_says(tmp_path: Path) -> None:
    module = Sized()
    own = make_trainer(1, AsyncLocalSGDStrategy(), max_steps=2, callbacks=[BatchSizeFinder()])
    with pytest.raises(MisconfigurationException, match="without this strategy"):
        own.fit(module)
    trainer = make_trainer(1, "auto", default_root_dir=tmp_path, max_steps=1)  # type: ignore[arg-type]
    assert Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1) == module.batch_size > 2

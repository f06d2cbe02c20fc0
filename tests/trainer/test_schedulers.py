"""Learning-rate schedulers follow the job, also those that the module steps, that watch a metric, or count epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import Regression, make_trainer, regression_data, stream
from tests.processes import results, run_processes

STEPS = 40
PAUSES = (0.002, 0.015)


class ByHand(Regression):
    """Steps one schedule in each training step, as manual optimization asks for, and another one in a hook."""

    def __init__(self) -> None:
        super().__init__(PAUSES)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        self.linear = LambdaLR(torch.optim.SGD(self.parameters(), lr=1.0), lambda step: 1 - step / STEPS)
        return [optimizer], [OneCycleLR(optimizer, 0.01, total_steps=STEPS)]

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedule.step()

    def on_train_batch_end(self, *args: Any) -> None:
        self.linear.step()


def by_hand(rank: int, size: int) -> Any:
    module = ByHand()
    trainer = make_trainer(size, AsyncLocalSGDStrategy(local_steps=5), max_steps=STEPS)
    trainer.fit(module, stream(rank))
    schedules = module.lr_schedulers(), module.linear
    return [s.last_epoch for s in schedules], module.linear.get_last_lr()[0], [type(s) for s in schedules]


def test_schedules_that_the_module_steps_count_the_steps_of_the_job() -> None:
    for counts, rate, types in results(run_processes(by_hand, 2, 2)):
        # A call of its own may be a step early or late, but for the steps after this worker's last one.
        assert all(0.7 * STEPS <= count <= STEPS for count in counts)
        assert rate == pytest.approx(1 - counts[1] / STEPS)
        assert types == [OneCycleLR, LambdaLR]  # they are the user's own again


RATE = 2.0**-8


class Watching(Regression):
    """Its validation loss never falls; its schedule looks at it every 10 steps."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
        schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        config = {"scheduler": schedule, "monitor": "val_loss", "interval": "step", "frequency": 10}
        return {"optimizer": optimizer, "lr_scheduler": config}


def watching(rank: int, size: int) -> Any:
    module = Watching(PAUSES)
    options: dict[str, Any] = {"max_steps": 60, "val_check_interval": 10, "check_val_every_n_epoch": None}
    trainer = make_trainer(size, AsyncLocalSGDStrategy(local_steps=5), **options)
    trainer.fit(module, stream(rank), DataLoader(regression_data(4), batch_size=4))
    return trainer.optimizers[0].param_groups[0]["lr"], trainer.lr_scheduler_configs[0].frequency


def test_a_plateau_every_few_steps_takes_the_loss_of_worker_0_where_it_is_known() -> None:
    rates = results(run_processes(watching, 2, 2))
    assert rates[0] == (
        RATE * 0.5**5,
        10,
    )  # as under DDP: looked at after each of 6 validations, the first of them the best
    assert RATE * 0.5**5 <= rates[1][0] <= RATE * 0.5 and rates[1][1] == 10


class ByEpoch(Regression):
    """A schedule with Lightning's default, ``interval="epoch"``."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        return [optimizer], [StepLR(optimizer, 1)]


def by_epoch(rank: int, size: int) -> Any:
    trainer = make_trainer(size, AsyncLocalSGDStrategy(local_steps=5), max_steps=60)
    trainer.fit(ByEpoch(PAUSES), DataLoader(regression_data(40), batch_size=1))
    return trainer.lr_scheduler_configs[0].scheduler.last_epoch


def test_epochs_under_max_steps_are_those_of_the_job() -> None:
    # Under DDP, 40 batches are 20 steps of two devices: 60 steps are three epochs.
    assert results(run_processes(by_epoch, 2, 2)) == [3, 3]

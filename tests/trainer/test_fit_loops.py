"""Validation is due, and a run is over, by what the job has trained; users read their own numbers of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import Regression, make_trainer, regression_data
from tests.processes import results, run_processes

LOCKSTEP = {"quorum": 2, "pace": "fixed", "overlap": False, "grace_period": 0.0}


class Validated(Regression):
    """Notes the epoch and this worker's own batches of it at each validation."""

    def __init__(self, pauses: Sequence[float] = (0.0,)) -> None:
        super().__init__(pauses)
        self.at: list[tuple[int, int]] = []

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.at.append((self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready))


def validate(
    rank: int,
    size: int,
    batches: int,
    options: dict[str, Any],
    pauses: Sequence[float] = (0.0,),
    settings: dict[str, Any] | None = None,
    callbacks: Sequence[L.Callback] = (),
    ckpt: str | None = None,
) -> list[tuple[int, int]]:
    """Train with batches of one sample; under DDP without settings."""
    plan = "ddp" if settings is None else AsyncLocalSGDStrategy(local_steps=5, **settings)
    module = Validated(pauses)
    enable = {"callbacks": list(callbacks), "enable_checkpointing": bool(callbacks)}
    trainer = make_trainer(size, plan, **enable, **options)  # type: ignore[arg-type]
    val = DataLoader(regression_data(4), batch_size=4)
    trainer.fit(module, DataLoader(regression_data(batches), batch_size=1), val, ckpt_path=ckpt)
    return module.at


def test_one_process_validates_as_under_ddp(tmp_path: Path) -> None:
    options = {"max_epochs": 1, "val_check_interval": 10}
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=45, save_top_k=-1)
    (at,) = results(run_processes(validate, 1, 1, 100, options, (0.0,), {}, [save]))
    # Lightning's rule for DDP: (batch_idx + 1) % val_check_interval == 0.
    assert at == [(0, batches) for batches in range(10, 101, 10)]
    # Resumed in the middle of an interval, it goes on with the rest of that.
    again = results(run_processes(validate, 1, 1, 100, options, (0.0,), {}, [], str(tmp_path / "step=45.ckpt")))
    assert again == [at[4:]]


class Fails(L.Callback):
    """The validation after 50 batches fails in its step."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def fail(*args: Any) -> None:
            raise ArithmeticError("a bad batch")

        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 50:
            pl_module.validation_step = fail  # type: ignore[method-assign]


def test_a_validation_that_failed_is_made_again_when_the_run_goes_on(tmp_path: Path) -> None:
    options = {"max_epochs": 1, "val_check_interval": 25}
    save = ModelCheckpoint(tmp_path, "failed", save_on_exception=True, every_n_train_steps=10**6)
    (failed,) = run_processes(validate, 1, 1, 100, options, (0.0,), {}, [Fails(), save])
    assert "a bad batch" in failed.error
    (at,) = results(run_processes(validate, 1, 1, 100, options, (0.0,), {}, [], str(tmp_path / "failed.ckpt")))
    assert at == [(0, 50), (0, 75), (0, 100)]


@pytest.mark.parametrize(
    ("batches", "options"),
    [
        (80, {"max_epochs": 2, "val_check_interval": 0.25}),
        (50, {"max_epochs": 4, "val_check_interval": 40, "check_val_every_n_epoch": None}),
        (50, {"max_steps": 60, "val_check_interval": 10, "check_val_every_n_epoch": None}),
    ],
)
def test_equal_workers_validate_as_under_ddp(batches: int, options: dict[str, Any]) -> None:
    ddp, _ = results(run_processes(validate, 2, 2, batches, options))
    own, others = results(run_processes(validate, 2, 2, batches, options, (0.0,), LOCKSTEP))
    assert own == ddp and len(own) >= 2
    assert others == []


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({"max_epochs": 2, "val_check_interval": 0.5}, 4),
        ({"max_steps": 100, "val_check_interval": 25, "check_val_every_n_epoch": None}, 4),
    ],
)
def test_a_fast_worker_0_validates_as_often_as_under_ddp(options: dict[str, Any], validations: int) -> None:
    own, _ = results(run_processes(validate, 2, 2, 100, options, (0.002, 0.012), {}))
    assert len(own) == validations


class Reading(Regression):
    """Reads the attributes of its trainer that projects read, on every worker."""

    def __init__(self, pauses: Sequence[float]) -> None:
        super().__init__(pauses)
        self.read: dict[str, Any] = {}
        self.planned: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        trainer = self.trainer
        if trainer.fit_loop.epoch_loop.batch_idx >= 25:  # under DDP a validation is over by now
            self.losses.append(float(trainer.callback_metrics["val_loss"]))
        self.read = {
            "short": trainer.max_steps <= 1000,
            "reached": trainer.global_step < trainer.max_steps,
            "steps": trainer.max_steps,
            "batches": trainer.num_training_batches,
            "saves": isinstance(trainer.checkpoint_callback, ModelCheckpoint),
            "stops": isinstance(trainer.early_stopping_callback, EarlyStopping),
            "validated on": trainer.val_dataloaders and len(trainer.val_dataloaders.dataset),
            "limit": trainer.limit_val_batches,
        }

    def on_validation_end(self) -> None:
        self.planned.append(self.trainer.estimated_stepping_batches)


def reading(rank: int, size: int, folder: str) -> Any:
    module = Reading((0.002, 0.05))
    callbacks = [
        EarlyStopping("val_loss", patience=100),
        ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, save_weights_only=True),
    ]
    options: dict[str, Any] = {"max_epochs": 2, "max_steps": 40, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    plan = AsyncLocalSGDStrategy(local_steps=5)
    trainer = make_trainer(size, plan, callbacks=callbacks, enable_checkpointing=True, **options)
    trainer.fit(module, DataLoader(regression_data(100), batch_size=1), DataLoader(regression_data(4), batch_size=4))
    return module.read, module.planned, module.losses, trainer.global_step


def test_what_projects_read_of_their_trainer_is_as_under_ddp(tmp_path: Path) -> None:
    ends = results(run_processes(reading, 2, 2, str(tmp_path)))
    for read, _, _, steps in ends:
        under_ddp = {"short": True, "steps": 40, "batches": 50, "saves": True, "stops": True, "validated on": 4}
        assert read == under_ddp | {"limit": 1.0, "reached": steps < 40}
    assert ends[0][2]  # read without an error; NaN where the job was not as far yet
    assert ends[0][1] and set(ends[0][1]) == {40}
    saved = [int(path.stem.partition("step=")[2].partition("-")[0]) for path in tmp_path.glob("*.ckpt")]
    assert saved and max(saved) <= 40  # worker 0's own steps go on past that

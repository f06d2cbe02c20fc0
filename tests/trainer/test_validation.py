"""Validation during fit: by worker 0, of the global parameters, while the others train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import Regression, make_trainer, regression_data, stream
from tests.processes import results, run_processes

SAMPLES = 96


class Validated(Regression):
    """Records validation's parameters, and its own parameters and optimizer state before and after it."""

    def __init__(self, pauses: Any = (0.002, 0.01)) -> None:
        super().__init__(pauses)
        self.validated: list[int] = []
        self.swapped_in: list[Tensor] = []
        self.globals: list[Tensor] = []
        self.before: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []

    def own_state(self) -> list[Tensor]:
        optimizer = self.optimizers().optimizer
        state = [v for p in self.parameters() for v in optimizer.state[p].values()]
        return [t.detach().clone() for t in (*self.parameters(), *state)]

    def on_train_batch_end(self, *args: Any) -> None:
        self.last = self.own_state()

    def on_train_batch_start(self, *args: Any) -> None:
        if len(self.after) < len(self.before):
            self.after.append(self.own_state())

    def on_validation_start(self) -> None:
        if self.trainer.sanity_checking or self.trainer.strategy.worker is None:
            return
        self.before.append(self.last)
        self.swapped_in.append(nn.utils.parameters_to_vector(self.parameters()).clone())
        tensors = self.trainer.strategy.worker.global_tensors()
        self.globals.append(torch.cat([tensors[name].flatten() for name, _ in self.named_parameters()]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += batch[2].tolist()
        super().validation_step(batch, batch_idx)


def loader() -> DataLoader[Any]:
    return DataLoader(regression_data(SAMPLES), batch_size=16)


def validating(rank: int, size: int) -> Any:
    module = Validated()
    trainer = make_trainer(
        size,
        AsyncLocalSGDStrategy(local_steps=5),
        max_steps=60,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=2,
    )
    trainer.fit(module, stream(rank), loader())
    pairs = list(zip(module.before, module.after, strict=False))
    return {
        "seen": module.validated,
        "validations": len(module.before),
        "global": sum(torch.equal(a, b) for a, b in zip(module.swapped_in, module.globals, strict=True)),
        "own": sum(
            torch.equal(a, nn.utils.parameters_to_vector(b[: len(list(module.parameters()))]))
            for a, b in zip(module.swapped_in, module.before, strict=True)
        ),
        "kept": all(torch.equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True)),
        "pairs": len(pairs),
        "metric": float(trainer.callback_metrics["val_loss"]),
        "limit": trainer.limit_val_batches,
        "steps": trainer.global_step,
    }


def test_worker_0_validates_the_global_parameters_for_all() -> None:
    leader, other = results(run_processes(validating, 2, 2))
    assert leader["validations"] == 6  # by the steps of the job, of which there are 60
    assert leader["seen"] == list(range(32)) + list(range(SAMPLES)) * leader["validations"]
    # An outer update may come between the moment they are swapped in and the moment the test looks, but hardly twice.
    assert leader["global"] >= leader["validations"] - 1
    assert leader["own"] <= leader["validations"] // 2  # they are the same when it has just adopted them
    assert leader["pairs"] >= 5 and leader["kept"]
    assert other["validations"] == 0 and other["seen"] == []
    assert other["metric"] == leader["metric"]
    assert other["limit"] == leader["limit"] == 1.0


def validating_own(rank: int, size: int) -> Any:
    module = Validated()
    plan = AsyncLocalSGDStrategy(local_steps=5, validate_global=False)
    trainer = make_trainer(size, plan, max_steps=30, val_check_interval=10, check_val_every_n_epoch=None)
    trainer.fit(module, stream(rank), loader())
    own = [nn.utils.parameters_to_vector(b[: len(list(module.parameters()))]) for b in module.before]
    return len(own), all(torch.equal(a, b) for a, b in zip(module.swapped_in, own, strict=True))


def test_validation_of_local_parameters_is_an_option() -> None:
    for validations, own in results(run_processes(validating_own, 2, 2)):
        assert validations >= 1 and own


class Plateaued(Regression):
    """Its validation loss never falls; the learning rate and early stopping watch it."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0 + self.trainer.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def watching(rank: int, size: int, folder: str) -> Any:
    stop = EarlyStopping("val_loss", patience=3)
    save = ModelCheckpoint(dirpath=folder, monitor="val_loss", save_top_k=2)
    module = Plateaued((0.002, 0.006))
    trainer = make_trainer(
        size, AsyncLocalSGDStrategy(local_steps=5), max_epochs=40, callbacks=[stop, save], enable_checkpointing=True
    )
    trainer.fit(module, DataLoader(regression_data(80), batch_size=4), loader())
    return {
        "epochs": trainer.current_epoch,
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "best": save.best_model_path,
        "score": float(save.best_model_score),
        "stopped": stop.stopped_epoch,
        "callbacks": [type(c).__name__ for c in trainer.callbacks],
        "frequency": trainer.lr_scheduler_configs[0].frequency,
    }


def test_what_watches_a_metric_decides_for_all_workers(tmp_path: Path) -> None:
    leader, other = results(run_processes(watching, 2, 2, str(tmp_path)))
    assert leader["epochs"] == 4 and leader["stopped"] == other["stopped"] == 3
    assert leader["lr"] == other["lr"] == 1e-2 * 0.5**3
    assert leader["best"] == other["best"] and Path(leader["best"]).exists()
    assert leader["score"] == other["score"] == 1.0
    assert leader["callbacks"] == other["callbacks"]
    assert other["frequency"] == 1


class Failing(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            raise ArithmeticError("no loss today")


def failing(rank: int, size: int) -> None:
    trainer = make_trainer(
        size, AsyncLocalSGDStrategy(local_steps=5), max_steps=10**6, val_check_interval=10, check_val_every_n_epoch=None
    )
    trainer.fit(Failing(), stream(rank), loader())


def test_an_error_in_validation_ends_all_workers() -> None:
    leader, other = run_processes(failing, 2, 2)
    assert "ArithmeticError: no loss today" in leader.error
    assert "Worker 0" in other.error and "no loss today" in other.error
    assert leader.exitcode != 0 != other.exitcode


def sanity_only(rank: int, size: int) -> Any:
    module = Validated((0.0,))
    trainer = make_trainer(size, AsyncLocalSGDStrategy(local_steps=5), max_steps=10, num_sanity_val_steps=-1)
    trainer.fit(module, stream(rank), loader())
    outside = trainer.validate(module, loader(), verbose=False)
    return module.validated, outside


@pytest.mark.parametrize("size", [2, 3])
def test_sanity_checking_is_worker_0s_and_validation_outside_fit_everyones(size: int) -> None:
    ends = results(run_processes(sanity_only, size, size))
    assert ends[0][0][:SAMPLES] == list(range(SAMPLES))
    outside = [ends[0][0][SAMPLES:], *(seen for seen, _ in ends[1:])]
    assert sorted(set().union(*outside)) == list(range(SAMPLES))
    assert all(len(seen) == SAMPLES // size for seen in outside)
    assert all(metrics == ends[0][1] for _, metrics in ends)


def slow_leader(rank: int, size: int, pauses: tuple[float, float]) -> Any:
    stop = EarlyStopping("val_loss", patience=50)
    trainer = make_trainer(size, AsyncLocalSGDStrategy(local_steps=2), max_steps=20, callbacks=[stop])
    data = DataLoader(regression_data(256), batch_size=8)  # 16 batches per worker
    module = Validated(pauses)
    trainer.fit(module, data, loader())
    return trainer.strategy.summary.local_steps, "val_loss" in trainer.callback_metrics, len(module.swapped_in)


def test_a_run_in_which_worker_0_ends_no_pass_is_validated_at_its_end() -> None:
    (steps, *of_0), (_, *of_1) = results(run_processes(slow_leader, 2, 2, (0.08, 0.002)))
    assert steps[0] < 16
    assert of_0 == [True, 1] and of_1 == [True, 0]

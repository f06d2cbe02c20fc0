"""Averages of weights (EMA, SWA): worker 0's average is validated, saved, and on all workers at the end."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.trainer.final_module import _checksum
from tests.modules import FEATURES, Regression, checkpoints, make_trainer, regression_data, stream
from tests.processes import results, run_processes


class Normalized(Regression):
    """With frozen parameters, float buffers and an integer one; keeps its parameters on either side of a validation."""

    def __init__(self) -> None:
        super().__init__((0.001, 0.01))
        self.norm = nn.BatchNorm1d(FEATURES)
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.validated: list[list[float]] = []
        self.kept: list[bool] = []
        self._before: list[Tensor] | None = None

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(self.norm(self.frozen(batch[0]))), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        self._before = [p.clone() for p in self.parameters()]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append(values(self))
        super().validation_step(batch, batch_idx)

    def on_train_batch_start(self, *args: Any) -> None:
        if self._before is not None:
            self.kept.append(all(torch.equal(p, q) for p, q in zip(self.parameters(), self._before, strict=True)))


class OwnAverage(L.Callback):
    """As users write it: swaps its average in for validation, in the outermost hooks; leaves it in the end."""

    def __init__(self, end: str) -> None:
        self.end = end
        self.average: dict[str, Tensor] = {}
        self.aside: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for name, tensor in pl_module.state_dict().items():
            old = self.average.get(name, tensor)
            self.average[name] = old.lerp(tensor, 0.1) if tensor.is_floating_point() else tensor.clone()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.average:
            self.aside = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
            pl_module.load_state_dict(self.average)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.average:
            pl_module.load_state_dict(self.aside)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.end == "on_train_end":
            pl_module.load_state_dict(self.average)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.end == "on_fit_end":
            pl_module.load_state_dict(self.average)
        if self.end == "error" and trainer.is_global_zero:
            raise ArithmeticError("no average today")

    def values(self) -> list[float]:
        return torch.cat([t.double().flatten() for t in self.average.values()]).tolist()


class Ema(EMAWeightAveraging):
    def __init__(self) -> None:
        super().__init__(decay=0.9)

    def values(self) -> list[float]:
        return values(self._average_model.module)


def values(module: nn.Module) -> list[float]:
    return torch.cat([t.double().flatten() for t in module.state_dict().values()]).tolist()


def strategy() -> AsyncLocalSGDStrategy:
    return AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))


class Watch(L.Callback):
    """Keeps the average as it was before each validation."""

    def __init__(self, average: Any) -> None:
        self.average = average
        self.averages: list[list[float]] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.averages.append(self.average.values())


def averaging(rank: int, size: int, kind: str) -> Any:
    module, plan = Normalized(), strategy()
    average = Ema() if kind == "lightning" else OwnAverage(kind)
    watch = Watch(average)
    trainer = make_trainer(
        size, plan, max_steps=30, val_check_interval=7, check_val_every_n_epoch=None, callbacks=[watch, average]
    )
    trainer.fit(module, stream(rank), DataLoader(regression_data(8), batch_size=8))
    assert plan.summary is not None and plan.worker is None
    return {
        "end": values(module),
        "average": average.values(),
        "averages": watch.averages,
        "validated": module.validated,
        "kept": module.kept,
        "digest": plan.summary.digest,
        "callbacks": [type(c).__name__ for c in trainer.callbacks],
    }


@pytest.mark.parametrize("kind", ["lightning", "on_train_end", "on_fit_end"])
def test_the_average_of_worker_0_is_validated_and_is_everyones_in_the_end(kind: str) -> None:
    leader, other = results(run_processes(averaging, 2, 2, kind))
    assert leader["end"] == other["end"] == leader["average"] != other["average"]
    assert leader["digest"] == other["digest"]
    assert len(leader["validated"]) >= 2 and not other["validated"]
    assert leader["validated"] == leader["averages"]
    assert len(leader["kept"]) > 10 and all(leader["kept"])
    assert leader["callbacks"] == other["callbacks"]


def test_an_error_at_the_very_end_of_worker_0_leaves_nobody_waiting() -> None:
    leader, other = run_processes(averaging, 2, 2, "error")
    assert "no average today" in leader.error
    assert other.exitcode == 0


def saving(rank: int, size: int, folder: str, ckpt: str | None, max_steps: int) -> Any:
    module, plan, average = Normalized(), strategy(), Ema()
    globals_then: dict[str, list[float]] = {}

    class Look(L.Callback):
        """Comes after the callback that saves, and before the next step."""

        def on_train_batch_start(self, *args: Any) -> None:
            if trainer.global_step == 14 and rank == 0:
                globals_then.setdefault("average", average.values())

    loaded: list[list[float]] = []

    class Loaded(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            loaded.extend([average.values(), values(module)])

    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=14, save_top_k=-1)
    trainer = make_trainer(
        size, plan, max_steps=max_steps, callbacks=[average, Look(), Loaded(), save], enable_checkpointing=True
    )
    trainer.fit(module, stream(rank), ckpt_path=ckpt)
    return globals_then, loaded, values(module), plan.summary, average.values()


def test_a_checkpoint_holds_the_average_and_the_global_model_and_goes_on_from_both(tmp_path: Path) -> None:
    first = results(run_processes(saving, 2, 2, str(tmp_path), None, 30))
    path = checkpoints(tmp_path)[0]
    saved = torch.load(path, weights_only=True)
    flat = {
        key: torch.cat([t.double().flatten() for t in saved[key].values()]).tolist()
        for key in ("state_dict", "current_model_state")
    }
    assert flat["state_dict"] == first[0][0]["average"]
    shared = saved["async_localsgd"]["state"]["global"]["tensors"]
    for name, tensor in shared.items():
        assert torch.equal(saved["current_model_state"][name], tensor)
    assert values(Normalized.load_from_checkpoint(path)) == flat["state_dict"]
    again = results(run_processes(saving, 2, 2, str(tmp_path / "again"), str(path), 60))
    for _, (average, _), end, summary, _ in again:
        assert average == flat["state_dict"]
        assert end == again[0][2] == again[0][4]
        assert summary.total_local_steps >= 118


def swa(rank: int, size: int, with_norm: bool) -> Any:
    plan = strategy()
    module = Normalized() if with_norm else Regression((0.001, 0.004))
    average = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    trainer = make_trainer(size, plan, max_epochs=4, callbacks=[average])
    trainer.fit(module, DataLoader(regression_data(64), batch_size=4))
    return values(module), values(average._average_model), plan.summary, int(average.n_averaged)


def test_stochastic_weight_averaging() -> None:
    leader, other = results(run_processes(swa, 2, 2, False))
    assert leader[0] == other[0] == leader[1] != other[1]
    assert leader[2].digest == other[2].digest and leader[3] >= 2


def test_stochastic_weight_averaging_with_batch_norm_names_the_way_out() -> None:
    for outcome in run_processes(swa, 2, 2, True):
        assert "`WeightAveraging`" in outcome.error and "BatchNorm" in outcome.error


class Rebuilds(WeightAveraging):
    """Adds a layer on worker 0 alone."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            pl_module.net.append(nn.Linear(1, 1))


def rebuilding(rank: int, size: int) -> Any:
    module = Regression((0.001,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(size, strategy(), max_steps=10, callbacks=[Rebuilds()]).fit(module, stream(rank))
    return values(module.net[:3]), [str(w.message) for w in caught if "different tensors" in str(w.message)]


def test_what_worker_0_alone_has_in_its_module_is_warned_of() -> None:
    ends = results(run_processes(rebuilding, 2, 2))
    for end, told in ends:
        assert end == ends[0][0]
        assert "net.3.bias: float32[1], net.3.weight: float32[1, 1] are not on all of them" in told[0]


class KeepsAverage(Regression):
    """An average within the module, brought up to date after each batch; worker 0 asks all to stop."""

    def __init__(self) -> None:
        super().__init__((0.001, 0.01))
        self.average = AveragedModel(self.net).requires_grad_(False)

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.update_parameters(self.net)
        self.trainer.should_stop = self.trainer.is_global_zero and self.trainer.global_step >= 20


def stopping(rank: int, size: int) -> Any:
    module = KeepsAverage()
    make_trainer(size, strategy(), max_epochs=-1).fit(module, stream(rank))
    return values(module), int(module.average.n_averaged)


def test_an_average_within_the_module_is_worker_0s_on_all() -> None:
    leader, other = results(run_processes(stopping, 2, 2))
    assert leader[0] == other[0]
    assert leader[1] == other[1] >= 20


def test_checksums_tell_tensors_of_any_kind_apart() -> None:
    flat = torch.arange(40, dtype=torch.float32)
    tensors = [flat[1:8], flat.bfloat16()[3:30], flat[:32].view(4, 8).t(), torch.tensor(True), flat.to(torch.int8)]
    for tensor in tensors:
        other = tensor.clone(memory_format=torch.contiguous_format)
        assert _checksum(other) == _checksum(tensor)
        other.view(-1)[0] = not other.view(-1)[0] if tensor.dtype == torch.bool else 99
        assert _checksum(other) != _checksum(tensor)


def test_checksums_tell_scalars_apart_whose_bytes_are_alike() -> None:
    # A bias of one element: two averages of it have the same sum of bytes once in some hundred runs.
    scalars = [torch.tensor([value], dtype=torch.uint8) for value in (1, 2)]
    scalars += [
        torch.tensor([first, second, 73, 61], dtype=torch.uint8).view(torch.float32)
        for first, second in ((94, 186), (186, 94), (93, 187))
    ]
    assert len({_checksum(scalar) for scalar in scalars}) == len(scalars)

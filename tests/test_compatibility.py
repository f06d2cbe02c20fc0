"""What people use Lightning with, row by row: two workers of unequal speed, and the property that must hold."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from lightning.pytorch.demos import Transformer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests.modules import FEATURES, Regression, make_net, make_trainer, regression_data
from tests.processes import results, run_processes

VOCABULARY = 50


class Tokens(L.LightningModule):
    """Lightning's demo transformer, on random tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=VOCABULARY, ninp=8, nhead=2, nhid=8, nlayers=1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        output = self.model(batch[0], batch[0])
        return nn.functional.nll_loss(output, batch[0].view(-1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


class Normalized(Regression):
    """With BatchNorm, whose statistics are float buffers and whose count is an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(self.norm(batch[0])), batch[1])


class Tied(Regression):
    """Two layers that share a weight, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        x = self.second(self.first(self.frozen(batch[0])))
        return nn.functional.mse_loss(self.net(x), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Late(Regression):
    """Builds its net in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = make_net()


class Metered(Regression):
    """Keeps a torchmetrics object and gathers within its worker."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        self.log("loss", loss, sync_dist=True)
        assert self.all_gather(loss.detach()).numel() == 1
        return loss


class Adversarial(L.LightningModule):
    """A GAN of two small nets, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(4, FEATURES)
        self.critic = nn.Linear(FEATURES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generate, criticize = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        losses = (
            (criticize, lambda: self.critic(fake.detach()).mean() - self.critic(batch[0]).mean()),
            (generate, lambda: -self.critic(fake).mean()),
        )
        for optimizer, loss in losses:
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=1e-2) for net in (self.generator, self.critic)]


class Unfreezing(BaseFinetuning):
    """Freezes the first layer before the training starts, and leaves it so."""

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        pass


@dataclass
class Row:
    """One thing that people use."""

    module: Callable[[], L.LightningModule] = Regression
    trainer: Callable[[], dict[str, Any]] = dict
    data: Callable[[], Any] = lambda: DataLoader(regression_data(64), batch_size=4)
    callbacks: Callable[[], list[L.Callback]] = list
    check: Callable[[L.Trainer, L.LightningModule], Any] = field(default=lambda trainer, module: None)
    """Runs on every worker after ``fit``; what it returns must be true."""


def tokens() -> Any:
    return DataLoader(TensorDataset(torch.randint(VOCABULARY, (64, 6))), batch_size=4)


def dtype_of(dtype: torch.dtype) -> Callable[[L.Trainer, L.LightningModule], bool]:
    return lambda trainer, module: all(p.dtype == dtype for p in module.parameters())


def trains_frozen(trainer: L.Trainer, module: L.LightningModule) -> bool:
    return not module.net[0].weight.requires_grad and torch.equal(module.net[0].weight, make_net()[0].weight)


ROWS = {
    "boring": Row(BoringModel, data=BoringDataModule),
    "manual": Row(ManualOptimBoringModel, data=BoringDataModule),
    "transformer": Row(Tokens, data=tokens),
    "gan": Row(Adversarial),
    "batch norm": Row(Normalized, check=lambda trainer, module: int(module.norm.num_batches_tracked) > 0),
    "tied and frozen": Row(Tied, check=lambda trainer, module: module.second.weight is module.first.weight),
    "configure_model": Row(Late),
    "metrics": Row(Metered, check=lambda trainer, module: "loss" in trainer.callback_metrics),
    "bf16-mixed": Row(trainer=lambda: {"precision": "bf16-mixed"}, check=dtype_of(torch.float32)),
    "bf16-true": Row(trainer=lambda: {"precision": "bf16-true"}, check=dtype_of(torch.bfloat16)),
    "64-true": Row(trainer=lambda: {"precision": "64-true"}, check=dtype_of(torch.float64)),
    "clipping": Row(trainer=lambda: {"gradient_clip_val": 0.1}),
    "accumulation": Row(trainer=lambda: {"accumulate_grad_batches": 2}),
    "accumulation scheduler": Row(callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2})]),
    "finetuning": Row(callbacks=lambda: [Unfreezing()], check=trains_frozen),
    "fast_dev_run": Row(trainer=lambda: {"fast_dev_run": True}, check=lambda trainer, module: trainer.max_steps == 1),
    "overfit_batches": Row(trainer=lambda: {"overfit_batches": 2}),
    "limit_train_batches": Row(trainer=lambda: {"limit_train_batches": 3}),
    "max_time": Row(trainer=lambda: {"max_time": timedelta(seconds=0.5), "max_steps": -1, "max_epochs": -1}),
    "inference_mode": Row(trainer=lambda: {"inference_mode": False, "val_check_interval": 2}),
    "max_epochs": Row(trainer=lambda: {"max_epochs": 2, "max_steps": -1}),
}


class Unequal(L.Callback):
    """Makes worker 1 slow."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        time.sleep(0.002 if trainer.global_rank == 0 else 0.006)


def fit(rank: int, size: int, name: str) -> Any:
    row = ROWS[name]
    torch.manual_seed(0)
    module, plan = row.module(), AsyncLocalSGDStrategy(local_steps=3, timeout=timedelta(seconds=30))
    trainer = make_trainer(size, plan, **({"max_steps": 12} | row.trainer()), callbacks=[Unequal(), *row.callbacks()])
    data = row.data()
    if isinstance(data, L.LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, data, DataLoader(regression_data(8), batch_size=4) if name != "transformer" else None)
    state = [t.double().flatten() for t in module.state_dict().values() if t.is_floating_point()]
    return plan.summary, torch.cat(state).tolist(), row.check(trainer, module)


@pytest.mark.parametrize("name", ROWS)
def test_two_unequal_workers_end_with_the_same_module(name: str) -> None:
    ends = results(run_processes(fit, 2, 2, name))
    for summary, state, check in ends:
        assert summary.digest == ends[0][0].digest
        assert summary.version > 0
        assert state == ends[0][1] and torch.tensor(state).isfinite().all()
        assert check in (None, True)

"""Common uses of Lightning, row by row: two workers of unequal speed, and the property that must hold."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    Timer,
)
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.worker.summary import RunSummary
from tests.modules import FEATURES, Regression, make_net, make_trainer, regression_data
from tests.processes import results, run_processes

# ---- modules ---------------------------------------------------------------------------------------------------------


class Seeing(Regression):
    """Keeps the precision of its forward pass, the gradients its optimizer met, and how it was validated."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_dtype: torch.dtype | None = None
        self.norms: list[float] = []
        self.validated_with_gradients: set[bool] = set()

    def loss(self, batch: Any) -> Tensor:
        prediction = self.net(batch[0])
        self.forward_dtype = prediction.dtype
        return nn.functional.mse_loss(prediction.to(batch[1].dtype), batch[1])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms.append(self.norm())

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in self.net.parameters()])))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.validated_with_gradients.add(torch.is_grad_enabled())
        super().validation_step(batch, batch_idx)


class Clipped(Seeing):
    """Keeps the norm of its gradients before and after they are clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.clipped.append(self.norm())


class Fused(Seeing):
    """With an optimizer that handles a gradient scaler's requests itself."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


class Normalized(Regression):
    """With BatchNorm, whose statistics are float buffers and whose count is an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(self.norm(batch[0])), batch[1])


class Buffered(Regression):
    """With buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("mask", torch.full((FEATURES,), -torch.inf))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("seen_any", torch.tensor(False))
        self.register_buffer("hidden", torch.zeros(FEATURES), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean.lerp_(batch[0].mean(0), 0.1)
        self.hidden.lerp_(batch[0].mean(0), 0.1)
        self.count += 1
        self.seen_any |= True
        return super().training_step(batch, batch_idx)


class Tied(Regression):
    """Two layers that share a weight, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.before = self.first.weight.tolist(), self.frozen.weight.tolist()

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


class Lazy(Regression):
    """Its first layer takes its width from the first batch: that of a dry run, or none before ``fit``."""

    def __init__(self, dry_run: bool = True) -> None:
        super().__init__()
        self.dry_run = dry_run
        self.net = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 1))

    def configure_model(self) -> None:
        if self.dry_run:
            self.net(torch.zeros(1, FEATURES))


class Metered(Regression):
    """Keeps torchmetrics objects and gathers within its worker."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.val_mean = MeanMetric(), MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        self.log("loss", loss, sync_dist=True)
        assert self.all_gather(loss.detach()).numel() == 1
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_mean.update(self.loss(batch))
        assert self.all_gather(self.val_mean.compute()).numel() == 1

    def on_validation_epoch_end(self) -> None:
        self.log("val_mean", self.val_mean.compute())
        self.val_mean.reset()


class Adversarial(L.LightningModule):
    """A GAN of two small nets, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(4, FEATURES)
        self.critic = nn.Linear(FEATURES, 1)
        self.before = self.generator.weight.tolist(), self.critic.weight.tolist()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generate, criticize = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        losses = (
            (criticize, lambda: self.critic(fake.detach()).mean() - self.critic(batch[0]).mean()),
            (generate, lambda: -self.critic(fake).mean()),
        )
        for optimizer, loss in losses:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=1e-2) for net in (self.generator, self.critic)]


class Raw(Regression):
    """Steps its optimizer past Lightning, on every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.loss(batch).backward()
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class SecondOrder(Regression):
    """LBFGS evaluates its closure several times per step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Wrapper(torch.optim.Optimizer):
    """Wraps an optimizer, without ``Optimizer.__init__``, as some libraries do."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)


class Wrapped(Regression):
    def configure_optimizers(self) -> Any:
        return Wrapper(super().configure_optimizers())


class Backboned(Regression):
    """A pretrained backbone that trains from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES))
        self.before = self.backbone[0].weight.tolist()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class HalfCompiled(Regression):
    """Compiles its net alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")  # type: ignore[assignment]


# ---- callbacks -------------------------------------------------------------------------------------------------------


class Unequal(L.Callback):
    """Makes worker 1 slow, and counts batches.

    Worker 1 makes one step to three of worker 0, however the machine treats them: it looks at a file in the working
    folder. It waits so for two seconds at most, for worker 0 may have ended.
    """

    def __init__(self) -> None:
        self.batches: Counter[int] = Counter()
        self.accumulated: dict[int, int] = {}
        self.patience = 2.0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        made, log = self.batches.total(), Path("batches_of_worker_0")
        if trainer.global_rank == 0:
            with log.open("a") as file:
                file.write(".")
        while trainer.global_rank > 0 and self.patience > 0:
            time.sleep(0.01)
            self.patience -= 0.01
            if log.exists() and log.stat().st_size > 3 * made:
                break
        self.batches[trainer.current_epoch] += 1
        self.accumulated[trainer.current_epoch] = trainer.accumulate_grad_batches

    @property
    def optimizer_steps(self) -> int:
        """A step for each full accumulation, and one at the end of each epoch."""
        return sum(-(-batches // self.accumulated[epoch]) for epoch, batches in self.batches.items())


class Layers(BaseFinetuning):
    """Freezes the first layer before the training, trains it from one epoch on, and freezes it again at another."""

    def __init__(self, thaw: int | None = None, freeze: int | None = None) -> None:
        super().__init__()
        self.epochs = {thaw: True, freeze: False}

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch in self.epochs:
            pl_module.net[0].requires_grad_(self.epochs[epoch])


class Unfreezing(L.Callback):
    """A user's own."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pl_module.net[0].requires_grad_(False)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 2:
            pl_module.net[0].requires_grad_(True)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass
class End:
    """The observations of one worker for a row's property."""

    rank: int
    trainer: L.Trainer
    module: Any
    summary: RunSummary
    unequal: Unequal

    @property
    def local_steps(self) -> int:
        return self.summary.local_steps[self.rank]

    @property
    def batches(self) -> int:
        return self.unequal.batches.total()


def loader() -> Any:
    return DataLoader(regression_data(64), batch_size=4)


def own_loaders() -> None:
    """The module has them."""


@dataclass
class Row:
    """One thing that people use."""

    module: Callable[[], Any] = Regression
    trainer: Callable[[], dict[str, Any]] = dict
    data: Callable[[], Any] = loader
    callbacks: Callable[[], list[L.Callback]] = list
    strategy: dict[str, Any] = field(default_factory=dict)
    check: Callable[[End], bool] = field(default=lambda end: True)
    """The property, looked at on every worker after ``fit``."""


def precision(forward: torch.dtype, parameters: torch.dtype) -> Callable[[End], bool]:
    def check(end: End) -> bool:
        return end.module.forward_dtype == forward and all(p.dtype == parameters for p in end.module.parameters())

    return check


def scaled() -> dict[str, Any]:
    """``precision="16-mixed"`` as on an accelerator; at first its scale is much too large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def skipped_steps_do_not_count(end: End) -> bool:
    skipped = sum(not torch.tensor(norm).isfinite() for norm in end.module.norms)
    return 0 < skipped == end.batches - end.local_steps and precision(torch.float16, torch.float32)(end)


def clips(end: End) -> bool:
    return max(end.module.norms) > 0.11 and max(end.module.clipped) < 0.101


def every_batch_steps(end: End) -> bool:
    return end.batches == end.local_steps


def accumulates(end: End) -> bool:
    return end.local_steps == end.unequal.optimizer_steps < end.batches


def first_layer(changed: bool, trainable: bool) -> Callable[[End], bool]:
    def check(end: End) -> bool:
        weight = end.module.net[0].weight
        return torch.equal(weight, make_net()[0].weight) != changed and weight.requires_grad == trainable

    return check


def tied(end: End) -> bool:
    module, (first, frozen) = end.module, end.module.before
    kept = module.second.weight is module.first.weight and module.frozen.weight.tolist() == frozen
    return kept and module.first.weight.tolist() != first


def buffers(end: End) -> bool:
    module = end.module
    follows = int(module.count) == end.summary.local_steps[0] and bool(module.seen_any)
    averaged = bool(module.mean.abs().min() > 0) and torch.equal(module.mean, module.hidden)
    return follows and averaged and bool(module.mask.isneginf().all())


def metered(end: End) -> bool:
    return {"mean", "loss", "val_mean"} <= end.trainer.callback_metrics.keys()


def takes_epochs(batches: int) -> Callable[[End], bool]:
    """Epochs of so many batches, and more than one of them."""
    return lambda end: max(end.unequal.batches.values()) == batches and len(end.unequal.batches) > 1


def overfits(end: End) -> bool:
    return set(end.module.seen) == set(range(8)) and takes_epochs(2)(end)


def takes_its_time(end: End) -> bool:
    timer = next(c for c in end.trainer.callbacks if isinstance(c, Timer))
    return end.rank > 0 or timer.time_elapsed("train") >= 0.5


def worker_0_validates(end: End) -> bool:
    return end.module.validated_with_gradients == ({False} if end.rank == 0 else set())


def both_nets_train(end: End) -> bool:
    generator, critic = end.module.before
    return end.module.generator.weight.tolist() != generator and end.module.critic.weight.tolist() != critic


def compiled() -> Any:
    return torch.compile(Regression(), backend="eager")


ROWS = {
    # Lightning's demo modules, unchanged
    "boring": Row(BoringModel, data=BoringDataModule),
    "boring, own loaders": Row(BoringModel, data=own_loaders),
    "manual": Row(ManualOptimBoringModel, data=BoringDataModule, check=every_batch_steps),
    "transformer": Row(lambda: LightningTransformer(vocab_size=60), data=own_loaders),
    # modules
    "gan": Row(Adversarial, check=both_nets_train),
    "batch norm": Row(
        Normalized, check=lambda end: int(end.module.norm.num_batches_tracked) == end.summary.local_steps[0]
    ),
    "sync batch norm": Row(
        Normalized,
        trainer=lambda: {"sync_batchnorm": True},
        check=lambda end: int(end.module.norm.num_batches_tracked) == end.summary.local_steps[0],
    ),
    "buffers": Row(Buffered, check=buffers),
    "tied and frozen": Row(Tied, check=tied),
    "configure_model": Row(Late),
    "lazy": Row(Lazy, check=lambda end: end.module.net[0].in_features == FEATURES),
    "compiled": Row(compiled, check=lambda end: end.module._compiler_ctx is not None),
    "compiled net": Row(HalfCompiled),
    "metrics": Row(Metered, check=metered),
    # optimizers
    "raw optimizer": Row(Raw, check=lambda end: end.batches == 2 * end.local_steps),
    "lbfgs": Row(SecondOrder, check=every_batch_steps),
    "wrapped optimizer": Row(Wrapped, check=every_batch_steps),
    # precision
    "16-mixed": Row(Seeing, trainer=scaled, check=skipped_steps_do_not_count),
    "16-mixed, fused": Row(Fused, trainer=scaled, check=skipped_steps_do_not_count),
    "bf16-mixed": Row(
        Seeing, trainer=lambda: {"precision": "bf16-mixed"}, check=precision(torch.bfloat16, torch.float32)
    ),
    "bf16-true": Row(
        Seeing, trainer=lambda: {"precision": "bf16-true"}, check=precision(torch.bfloat16, torch.bfloat16)
    ),
    "64-true": Row(Seeing, trainer=lambda: {"precision": "64-true"}, check=precision(torch.float64, torch.float64)),
    # options of the trainer
    "clipping": Row(Clipped, trainer=lambda: {"gradient_clip_val": 0.1}, check=clips),
    "accumulation": Row(trainer=lambda: {"accumulate_grad_batches": 2}, check=accumulates),
    "fast_dev_run": Row(
        Seeing,
        trainer=lambda: {"fast_dev_run": True},
        check=lambda end: end.batches == end.local_steps == 1 and worker_0_validates(end),
    ),
    "overfit_batches": Row(trainer=lambda: {"overfit_batches": 2}, check=overfits),
    "limit_train_batches": Row(trainer=lambda: {"limit_train_batches": 3}, check=takes_epochs(3)),
    "max_time": Row(
        trainer=lambda: {"max_time": timedelta(seconds=0.5), "max_steps": -1, "max_epochs": -1}, check=takes_its_time
    ),
    "inference_mode": Row(Seeing, trainer=lambda: {"val_check_interval": 2}, check=worker_0_validates),
    "no inference_mode": Row(
        Seeing, trainer=lambda: {"inference_mode": False, "val_check_interval": 2}, check=worker_0_validates
    ),
    "max_epochs": Row(
        trainer=lambda: {"max_epochs": 2, "max_steps": -1},
        check=lambda end: end.trainer.current_epoch == 2,
    ),
    # callbacks
    "accumulation scheduler": Row(
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
        check=lambda end: accumulates(end) or set(end.unequal.batches) == {0},
    ),
    "frozen by a callback": Row(callbacks=lambda: [Layers()], check=first_layer(changed=False, trainable=False)),
    "unfrozen by a callback": Row(
        callbacks=lambda: [Layers(thaw=1)],
        trainer=lambda: {"limit_train_batches": 2},
        check=first_layer(changed=True, trainable=True),
    ),
    "frozen again": Row(
        callbacks=lambda: [Layers(thaw=1, freeze=2)],
        trainer=lambda: {"limit_train_batches": 2},
        check=first_layer(changed=True, trainable=False),
    ),
    "backbone finetuning": Row(
        Backboned,
        callbacks=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2)],
        trainer=lambda: {"limit_train_batches": 2},
        check=lambda end: end.module.backbone[0].weight.tolist() != end.module.before,
    ),
    "unfrozen": Row(
        callbacks=lambda: [Unfreezing()],
        strategy={"exchange_frozen": True},
        check=first_layer(changed=True, trainable=True),
    ),
    "unfrozen, in fragments": Row(
        callbacks=lambda: [Unfreezing()],
        strategy={"exchange_frozen": True, "fragments": 2},
        check=first_layer(changed=True, trainable=True),
    ),
}


REFUSED = {
    "unfrozen": (Row(callbacks=lambda: [Unfreezing()]), "Pass `exchange_frozen=True`"),
    "lazy": (Row(lambda: Lazy(dry_run=False)), "in `configure_model` (or before `fit`)"),
    "pruning": (
        Row(
            callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.5)],
            trainer=lambda: {"limit_train_batches": 2},
        ),
        "Change the module before `fit`",
    ),
}


def fit(rank: int, size: int, row: Row, folder: str) -> End:
    os.chdir(folder)
    torch.manual_seed(0)
    plan = AsyncLocalSGDStrategy(local_steps=3, timeout=timedelta(seconds=30), **row.strategy)
    unequal = Unequal()
    trainer = make_trainer(size, plan, **({"max_steps": 12} | row.trainer()), callbacks=[unequal, *row.callbacks()])
    module, data = row.module(), row.data()
    if isinstance(data, L.LightningDataModule):
        trainer.fit(module, datamodule=data)
    elif data is None:
        trainer.fit(module)
    else:
        trainer.fit(module, data, DataLoader(regression_data(8), batch_size=4))
    assert plan.summary is not None and trainer.lightning_module is not None
    return End(rank, trainer, trainer.lightning_module, plan.summary, unequal)


def fit_and_check(rank: int, size: int, name: str, folder: str) -> Any:
    row = ROWS[name]
    end = fit(rank, size, row, folder)
    state = torch.cat([t.double().flatten() for t in (*end.module.parameters(), *end.module.buffers())])
    return end.summary, state.tolist(), row.check(end)


def fit_refused(rank: int, size: int, name: str, folder: str) -> None:
    fit(rank, size, REFUSED[name][0], folder)


@pytest.mark.parametrize("name", ROWS)
def test_two_unequal_workers_end_with_the_same_module(name: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    ends = results(run_processes(fit_and_check, 2, 2, name, str(tmp_path), timeout=160))  # to compile takes long
    for summary, state, holds in ends:
        assert holds
        assert summary.digest == ends[0][0].digest
        assert summary.version > 0 and min(summary.local_steps) > 0
        assert state == ends[0][1] and not torch.tensor(state).isnan().any()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    for outcome in run_processes(fit_refused, 2, 2, name, str(tmp_path)):
        assert outcome.exitcode == 1 and REFUSED[name][1] in outcome.error


def write_text(folder: Path) -> None:
    """Where Lightning's demo looks before it downloads."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(50, (100, 20), generator=generator)
    (folder / "data").mkdir()
    (folder / "data" / "wikitext-2.txt").write_text(
        "\n".join(" ".join(f"w{w}" for w in line) for line in words.tolist())
    )

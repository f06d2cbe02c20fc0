"""Detection of local steps, under Lightning and in a plain loop: no progress is lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_async_localsgd import AsyncLocalSGD, AsyncLocalSGDStrategy
from tests.modules import Batches, Regression, make_net, make_trainer, regression_data
from tests.processes import results, run_processes

PLAN: dict[str, Any] = {"local_steps": 4, "timeout": timedelta(seconds=30)}
AVERAGE: dict[str, Any] = PLAN | {
    "quorum": 2,
    "pace": "fixed",
    "overlap": False,
    "outer_optimizer": partial(torch.optim.SGD, lr=1.0),
}
"""Plain local SGD in lockstep: alike in every run."""


class SharpnessAware(Optimizer):
    """Two steps by names of its own, from a base optimizer (Foret et al. 2021); ``step`` is not called."""

    def __init__(self, params: Any, base: type[Optimizer] = AdamW, rho: float = 0.02, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm() + 1e-12
        self.ascent = [p.grad * 0.02 / norm for p in self.parameters()]
        for p, e in zip(self.parameters(), self.ascent, strict=True):
            p.add_(e)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, e in zip(self.parameters(), self.ascent, strict=True):
            p.sub_(e)
        self.base.step()
        self.zero_grad()


class Wrapped(Optimizer):
    """A wrapper that does without ``Optimizer.__init__``, so that torch gives its ``step`` no hooks."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Clipping(AdamW):
    """Calls the ``step`` that it inherits, which has hooks of its own if an ``AdamW`` was made before."""

    def step(self, closure: Any = None) -> Any:
        AdamW([nn.Parameter(torch.zeros(1))])
        return super().step(closure)


# ---- under Lightning -------------------------------------------------------------------------------------------------


class ByHand(Regression):
    """Manual optimization; :meth:`learn` makes the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.batches += 1
        self.learn(lambda: self.manual_backward(self.loss(batch)))

    def learn(self, backward: Callable[[], None]) -> None:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return None


class TwoNamedSteps(ByHand):
    def configure_optimizers(self) -> Any:
        return SharpnessAware(self.net.parameters(), lr=1e-2)

    def learn(self, backward: Callable[[], None]) -> None:
        optimizer = self.optimizers()
        for step in (optimizer.first_step, optimizer.second_step):
            backward()
            step()


class OfItsOwn(ByHand):
    def on_fit_start(self) -> None:
        self.own = AdamW(self.net.parameters(), lr=1e-2)

    def learn(self, backward: Callable[[], None]) -> None:
        backward()
        self.own.step()
        self.own.zero_grad()


class Written(ByHand):
    def learn(self, backward: Callable[[], None]) -> None:
        backward()
        for p in self.net.parameters():
            assert p.grad is not None
            with torch.no_grad():
                p -= 0.05 * p.grad
            p.grad = None


class WrittenPastAutograd(ByHand):
    """A write to ``data`` leaves no version."""

    def learn(self, backward: Callable[[], None]) -> None:
        backward()
        for p in self.net.parameters():
            assert p.grad is not None
            p.data.add_(p.grad, alpha=-0.05)
            p.grad = None


class Replaced(Regression):
    """The optimizer is another one after the first batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        if self.batches == 4:
            self.trainer.strategy.optimizers = [AdamW(self.net.parameters(), lr=1e-2)]


class Unhooked(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches += 1

    def configure_optimizers(self) -> Any:
        return Wrapped(AdamW(self.net.parameters(), lr=1e-2))


def loss(module: Regression) -> float:
    x, y, _ = regression_data(256).tensors
    return module.loss((x, y)).item()


def fit(rank: int, size: int, module: type[Any]) -> Any:
    plan, own = AsyncLocalSGDStrategy(**AVERAGE), module()
    make_trainer(size, plan, max_epochs=4).fit(own, DataLoader(regression_data(256), batch_size=4))
    return own.batches, plan.summary, loss(own)


@pytest.mark.parametrize("module", [TwoNamedSteps, OfItsOwn, Written, WrittenPastAutograd, Replaced, Unhooked])
def test_a_batch_that_changes_the_parameters_is_a_local_step(module: type[Any]) -> None:
    ends = results(run_processes(fit, 2, 2, module))
    for rank, (batches, summary, error) in enumerate(ends):
        assert summary.local_steps[rank] == batches and summary.total_local_steps == 4 * 64
        assert error == ends[0][2] < 0.7 * loss(Regression())


class OneInThree(Written):
    """Gradients are accumulated over three batches; validation swaps parameters meanwhile, as an average would."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(self.loss(batch))
        if batch_idx % 3 == 2:
            self.learn(lambda: None)
            self.batches += 1

    def on_validation_start(self) -> None:
        self.kept = [p.detach().clone() for p in self.net.parameters()]
        torch._foreach_mul_(list(self.net.parameters()), 0.5)

    def on_validation_end(self) -> None:
        torch._foreach_copy_(list(self.net.parameters()), self.kept)


def accumulating(rank: int, size: int) -> Any:
    plan, module = AsyncLocalSGDStrategy(**PLAN), OneInThree()
    data = DataLoader(regression_data(64), batch_size=4)
    torch.set_grad_enabled(True)
    make_trainer(size, plan, max_epochs=3, val_check_interval=0.25).fit(module, data, data)
    return module.batches, plan.summary


def test_batches_that_leave_the_parameters_alone_are_none() -> None:
    for rank, (steps, summary) in enumerate(results(run_processes(accumulating, 2, 2))):
        assert summary.local_steps[rank] == steps > 0


# ---- in a plain loop -------------------------------------------------------------------------------------------------


def plain_loop(rank: int, make: Callable[[Any], Optimizer], turn: Callable[[Any, Any], None], steps: int) -> Any:
    module = make_net()
    optimizer = make(list(module.parameters()))
    turns = 0
    with AsyncLocalSGD(module, optimizer, max_steps=steps, budget="per_worker", **PLAN) as job:
        for x, y in Batches(100 + rank):
            if not job.running:
                break
            turn(optimizer, lambda x=x, y=y: nn.functional.mse_loss(module(x), y).backward())
            turns += 1
    assert "step" not in vars(optimizer)
    return turns, job.summary


def one_step(optimizer: Any, backward: Callable[[], None]) -> None:
    backward()
    optimizer.step()
    optimizer.zero_grad()


def two_named_steps(optimizer: Any, backward: Callable[[], None]) -> None:
    for step in (optimizer.first_step, optimizer.second_step):
        backward()
        step()


def past_autograd(optimizer: Any, backward: Callable[[], None]) -> None:
    backward()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.add_(p.grad, alpha=-0.01)
            p.grad = None


def wrapped(params: Any) -> Optimizer:
    return Wrapped(AdamW(params))


@pytest.mark.parametrize(
    ("make", "turn"),
    [(SharpnessAware, two_named_steps), (wrapped, one_step), (Clipping, one_step), (SGD, past_autograd)],
)
def test_a_turn_of_a_loop_is_one_local_step_however_it_is_made(make: Any, turn: Any) -> None:
    for turns, summary in results(run_processes(plain_loop, 2, make, turn, 20)):
        assert turns == 20 and summary.local_steps == (20, 20)


def counted_by_hand(rank: int) -> Any:
    module = make_net()
    optimizer = SharpnessAware(module.parameters())
    with AsyncLocalSGD(module, optimizer, max_steps=20, budget="per_worker", **PLAN) as job:
        for x, y in Batches(100 + rank):
            two_named_steps(optimizer, lambda x=x, y=y: nn.functional.mse_loss(module(x), y).backward())
            job.step()
            if job.worker.local_steps == 20:
                break
    return job.summary


def test_a_step_can_be_counted_by_hand() -> None:
    assert all(summary.local_steps == (20, 20) for summary in results(run_processes(counted_by_hand, 2)))


def scaled(rank: int) -> Any:
    """At first the scale is much too large, and the scaler has the fused optimizer skip its steps."""
    module = make_net()
    optimizer = AdamW(module.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    skipped = made = 0
    with AsyncLocalSGD(module, optimizer, max_steps=20, budget="per_worker", **PLAN) as job:
        for x, y in Batches(100 + rank):
            if not job.running:
                break
            scaler.scale(nn.functional.mse_loss(module(x), y)).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped, made = skipped + (scaler.get_scale() < scale), made + (scaler.get_scale() == scale)
            optimizer.zero_grad()
    return skipped, made, job.summary


def test_a_step_that_a_scaler_has_a_fused_optimizer_skip_is_none() -> None:
    for skipped, made, summary in results(run_processes(scaled, 2)):
        assert skipped > 0 and made == 20 and summary.local_steps == (20, 20)


def schedulers(rank: int) -> list[str]:
    """Schedulers replace the method ``step``, too: before this library does, and after."""
    module = make_net()
    optimizer = SGD(module.parameters(), lr=0.01)
    early = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with AsyncLocalSGD(module, optimizer, max_steps=5, **PLAN) as job:
                late = torch.optim.lr_scheduler.StepLR(optimizer, 5)
                while job.running:
                    one_step(optimizer, lambda: module(torch.ones(1, 8)).sum().backward())
                    early.step()
                    late.step()
    optimizer.step()
    return [str(w.message) for w in caught if "scheduler" in str(w.message)]


def test_schedulers_are_stepped_as_ever() -> None:
    assert results(run_processes(schedulers, 2)) == [[], []]

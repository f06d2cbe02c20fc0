"""Optimizers that keep copies of the weights: they do not undo adoptions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_async_localsgd import AsyncLocalSGD, AsyncLocalSGDStrategy
from lightning_async_localsgd.worker.weight_copies import WeightCopies
from tests.modules import Regression, make_net, make_trainer, regression_data, stream
from tests.processes import results, run_processes

AVERAGE: dict[str, Any] = {
    "local_steps": 5,
    "quorum": 2,
    "pace": "fixed",
    "overlap": False,
    "outer_optimizer": partial(torch.optim.SGD, lr=1.0),
    "timeout": timedelta(seconds=30),
}
"""Plain local SGD in lockstep: alike in every run."""


class Masters(SGD):
    """Makes its steps on a copy of the parameters and writes that back (fp32 masters of low-precision parameters)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("fp32_copy", p.detach().clone())
                p.copy_(master.sub_(p.grad, alpha=group["lr"]))


class MastersOfItsOwn(SGD):
    """The same with the copies in a list, made with the optimizer."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.masters = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, masters in zip(self.param_groups, self.masters, strict=True):
            for p, master in zip(group["params"], masters, strict=True):
                p.copy_(master.sub_(p.grad, alpha=group["lr"]))


class TrainsCopies(SGD):
    """The same with the copies in the place of the parameters; its ``step`` writes them back."""

    def __init__(self, params: Any, lr: float) -> None:
        self.written = list(params)
        super().__init__([nn.Parameter(p.detach().clone()) for p in self.written], lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for copy, p in zip(self.param_groups[0]["params"], self.written, strict=True):
            copy.grad = p.grad
        super().step(closure)
        for copy, p in zip(self.param_groups[0]["params"], self.written, strict=True):
            p.copy_(copy)
            p.grad = None


class Lookahead(Optimizer):
    """Slow weights, k = 5 (Zhang et al. 2019), around another optimizer; does without ``Optimizer.__init__``."""

    def __init__(self, params: Any, lr: float) -> None:
        self.inner = SGD(params, lr)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, {}
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            slow = self.state[p].setdefault("slow", p.detach().clone())
            if self.steps % 5 == 0:
                p.copy_(slow.lerp_(p, 0.5))


class ScheduleFree(Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): parameters hold y, the state z."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                x = (p - (1 - group["beta"]) * z) / group["beta"]
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / self.steps)
                p.copy_(x.lerp(z, 1 - group["beta"]))


class DualAveraging(Optimizer):
    """The parameters are the initial ones minus the sum of all gradients."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                first = self.state[p].setdefault("x0", p.detach().clone())
                total = self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                p.copy_(first - group["lr"] * total)


def data(rank: int) -> tuple[Tensor, Tensor]:
    """Each worker's data is a half of the task: features of one sign."""
    x, y, _ = regression_data(512).tensors
    half = (x[:, 0] > 0) == bool(rank)
    return x[half][:128], y[half][:128]


def train(rank: int, make: Callable[..., Any], steps: int, lr: float, **kwargs: Any) -> Any:
    module = make_net()
    optimizer = make(module.parameters(), lr=lr)
    x, y = data(rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with AsyncLocalSGD(module, optimizer, max_steps=steps, **(AVERAGE | kwargs)) as job:
            while job.running:
                nn.functional.mse_loss(module(x), y).backward()
                optimizer.step()
                module.zero_grad()
    told = [str(w.message) for w in caught if "weight_copies" in str(w.message)]
    loss = sum(float(nn.functional.mse_loss(module(x), y).detach()) for x, y in map(data, range(2))) / 2
    return nn.utils.parameters_to_vector(module.parameters()).tolist(), loss, told


def masters(rank: int, fragments: int) -> Any:
    made = (SGD, Masters, MastersOfItsOwn, DualAveraging)
    return [train(rank, make, 40, 0.05, fragments=fragments) for make in made]


@pytest.mark.parametrize("fragments", [1, 2])
def test_an_optimizer_that_writes_its_copies_back_learns_from_the_others_as_without_them(fragments: int) -> None:
    for expected, *ends in results(run_processes(masters, 2, fragments)):
        assert expected[2] == []
        for (parameters, _, told), name in zip(ends, ("fp32_copy", "masters", "x0"), strict=True):
            assert parameters == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
            assert len(told) == 1 and f"['{name}']" in told[0]


def distances(rank: int) -> Any:
    """How far an adoption has moved the parameters, and their distance to the copies, for each adoption."""
    moved = []
    for make, name in ((Lookahead, "slow"), (ScheduleFree, "z")):
        module = make_net()
        optimizer = make(module.parameters(), lr=0.1)
        made, states = optimizer.step, []

        def step(made: Any = made, states: Any = states, module: Any = module, at: Any = (optimizer, name)) -> None:
            made()
            states.append(distance(module, *at))

        optimizer.step = step
        x, y = data(rank)
        with AsyncLocalSGD(module, optimizer, max_steps=40, **AVERAGE) as job:
            while job.running:
                nn.functional.mse_loss(module(x), y).backward()
                version = job.worker.version
                optimizer.step()  # and with it the adoption
                module.zero_grad()
                if job.worker.version > version:
                    before, after = states[-1], distance(module, optimizer, name)
                    moved.append([float((b - a).norm()) for b, a in zip(before, after, strict=True)])
    return moved


def distance(module: nn.Module, optimizer: Any, name: str) -> tuple[Tensor, Tensor]:
    own = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    return own, own - nn.utils.parameters_to_vector([optimizer.state[p][name] for p in module.parameters()]).detach()


def test_slow_weights_and_base_sequences_move_with_the_parameters() -> None:
    for moved in results(run_processes(distances, 2)):
        assert len(moved) >= 2 * 6
        for parameters, to_copies in moved:
            assert parameters > 1e-3 and to_copies < 1e-5


def named(rank: int) -> Any:
    return [train(rank, Masters, 40, 0.05, weight_copies=names) for names in (["fp32_copy"], [])]


def test_what_is_named_is_moved_without_a_word_and_nothing_else() -> None:
    moved, left = results(run_processes(named, 2))[0]
    assert moved[2] == left[2] == [] and moved[0] != pytest.approx(left[0], abs=1e-2)


class Flattened(SGD):
    """Makes its steps on one flat copy in a closure, where nobody else can find it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        own = self.param_groups[0]["params"]
        flat = nn.utils.parameters_to_vector(own).detach()

        def write() -> None:
            flat.sub_(nn.utils.parameters_to_vector([p.grad for p in own]), alpha=lr)
            for p, values in zip(own, flat.split([p.numel() for p in own]), strict=True):
                p.copy_(values.view_as(p))

        self.write = write

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.write()


def hidden(rank: int) -> Any:
    told = [train(rank, make, 60, 0.05, local_steps=10)[-1] for make in (Flattened, SGD, Masters)]
    return [[text.split()[0] for text in texts if "puts the parameters back" in text] for texts in told]


def test_an_optimizer_that_undoes_adoptions_from_where_nobody_sees_is_named() -> None:
    assert results(run_processes(hidden, 2)) == [[["Flattened"], [], []]] * 2


class OnlyCounts(torch.optim.AdamW):
    """Holds moments and a count of its steps."""


def test_moments_and_counts_are_no_copies() -> None:
    module = nn.ParameterList([nn.Parameter(torch.ones(())), nn.Parameter(torch.randn(4, 4))])
    optimizer = OnlyCounts(module.parameters(), lr=1e-3)
    copies = WeightCopies(module, [optimizer])
    sum(p.sum() for p in module).backward()  # type: ignore[union-attr]
    optimizer.step()
    copies.find()
    assert optimizer.state[module[0]]["step"] == 1 and copies.names == set()


class Fits(Regression):
    """Under Lightning, with asynchronous rounds and low-precision parameters; worker 1 is slow."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__([0.0, 0.002])
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters(), lr=0.05)


def fit(rank: int, size: int, make: Callable[..., Any]) -> Any:
    plan = AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30))
    module = Fits(make)
    trainer = make_trainer(size, plan, max_steps=100)
    trainer.fit(module, stream(rank))
    copies = trainer.optimizers[0].param_groups[0]["params"]
    return [p.tolist() for p in module.parameters()], [p.tolist() for p in copies], plan.summary


def test_copies_in_the_place_of_the_parameters_end_where_the_parameters_do() -> None:
    ends = results(run_processes(fit, 2, 2, TrainsCopies))
    for parameters, copies, summary in ends:
        assert parameters == ends[0][0] and summary.version > 2
        for p, copy in zip(parameters, copies, strict=True):
            torch.testing.assert_close(torch.tensor(copy), torch.tensor(p))

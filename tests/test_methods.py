"""Every method of the registry builds, is accepted as settings, and keeps replicas equal."""

from __future__ import annotations

from datetime import timedelta
from itertools import islice
from typing import Any

import pytest
import torch

from lightning_async_localsgd import METHODS, AsyncLocalSGDStrategy, RunSummary, Settings, Worker, make_method
from lightning_async_localsgd.outer import Arrival, AsyncBuffer, DelayedNesterov, GlobalState, Poly
from lightning_async_localsgd.outer.layout import Layout
from tests.modules import Batches, make_net
from tests.processes import job_store, results, run_processes

WORKERS = 4


def state_of(settings: Settings) -> GlobalState:
    state = GlobalState(
        Layout(make_net()), settings.outer_optimizer, WORKERS, settings.quorum, transforms=settings.transforms
    )
    state.flat.copy_(random_delta(state.layout, 0))
    return state


def random_delta(layout: Layout, seed: int) -> torch.Tensor:
    flat = layout.empty()
    generator = torch.Generator().manual_seed(seed)
    for view in layout.views(flat):
        view.copy_(torch.randn(view.shape, generator=generator))
    return flat


@pytest.mark.parametrize("pace", [None, "fixed", "dylu"])
@pytest.mark.parametrize("name", METHODS)
def test_replicas_of_every_method_agree(name: str, pace: str | None) -> None:
    settings = AsyncLocalSGDStrategy(local_steps=20, **make_method(name, WORKERS, pace=pace)).settings
    assert settings.fingerprint() == Settings(local_steps=20, **make_method(name, WORKERS, pace=pace)).fingerprint()
    assert settings.pace == (pace or METHODS[name].pace)
    replicas = [state_of(settings) for _ in range(WORKERS)]
    before = replicas[0].flat.clone()
    for i in range(14):
        workers = list(range(WORKERS)) if settings.quorum == WORKERS else [i * i % WORKERS]
        delta, snapshot = random_delta(replicas[0].layout, 1 + i), random_delta(replicas[0].layout, 100 + i)
        arrivals = [Arrival(worker, i % 12) for worker in workers]
        replicas[workers[0]].transform_delta(delta, arrivals[0], snapshot)  # by its sender alone
        for replica in replicas:
            accepted = [arrival for arrival in arrivals if replica.accepts(arrival)]
            replica.pseudo_gradient.copy_(delta)
            replica.apply(accepted, refused=len(arrivals) - len(accepted))
    assert len({replica.digest() for replica in replicas}) == 1
    assert torch.isfinite(replicas[0].flat).all() and not torch.equal(replicas[0].flat, before)


def test_every_method_is_one_of_its_own() -> None:
    described = {str(Settings(**make_method(name, WORKERS, outer_lr=0.1)).fingerprint()) for name in METHODS}
    assert len(described) == len(METHODS)


def test_synchronous_diloco_waits_for_all_and_the_others_for_nobody() -> None:
    sync = make_method("sync", workers=3)
    assert (sync["quorum"], sync["overlap"]) == (3, False)
    assert Settings(**sync).lockstep(3)
    for name in METHODS.keys() - {"sync"}:
        arguments = make_method(name, workers=3)
        assert arguments["quorum"] == 1 and "overlap" not in arguments


def test_what_is_given_replaces_the_defaults() -> None:
    arguments = make_method("async-momentum", 4, outer_lr=0.3, outer_momentum=0.8)
    group = arguments["outer_optimizer"]([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.3, 0.8, False)
    assert make_method("poly", 4, power=1.0)["transforms"] == (Poly(1.0),)
    assert make_method("async-buffer", 4, size=2)["transforms"] == (AsyncBuffer(2),)
    dn = make_method("dn", 4, momentum_activation=0.1)["outer_optimizer"]([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(dn, DelayedNesterov) and dn.param_groups[0]["momentum_activation"] == 0.1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_does_without_momentum(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = make_method(name, 1, outer_lr=0.5, outer_momentum=0)["outer_optimizer"]([parameter])
    if isinstance(optimizer, DelayedNesterov):
        optimizer.set_default_buffer_size(1)
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == 0.5


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"no method 'nesterov'.*async-buffer, async-momentum.*sync"):
        make_method("nesterov", 4)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"name": "poly", "workers": 0}, ValueError, "workers"),
        ({"name": "poly", "workers": 4, "pace": "slow"}, ValueError, "pace"),
        ({"name": "poly", "workers": 4, "power": -1}, ValueError, "power"),
        ({"name": "poly", "workers": 4, "outer_lr": -1}, ValueError, "learning rate"),
        ({"name": "poly", "workers": 4, "strength": 1}, TypeError, "strength"),
        ({"name": "async-sgd", "workers": 4, "power": 1}, TypeError, "power"),
        ({"name": "dn", "workers": 4, "momentum_activation": 2.0}, ValueError, "momentum_activation"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        make_method(**arguments)


def test_every_method_says_what_it_is_and_where_its_learning_rate_comes_from() -> None:
    for method in METHODS.values():
        assert "\n" not in method.description and "arXiv" in method.reference and method.outer_lr_source


# ---- in real processes -----------------------------------------------------------------------------------------------


def train(rank: int, size: int, name: str, options: dict[str, Any]) -> tuple[RunSummary, float]:
    method = make_method(name, size, **options)
    settings = Settings(local_steps=5, timeout=timedelta(seconds=20), **(method | {"overlap": False}))
    module = make_net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    worker = Worker(module, [optimizer], job_store(), rank, size, settings)
    held_out = next(iter(Batches(7, 512)))

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(module(x), y)

    before = loss(*held_out).item()
    worker.start(100)
    for x, y in islice(Batches(100 + rank), 10_000):
        loss(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not worker.step(samples=4):
            break
    return worker.finish(), loss(*held_out).item() / before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sync", {}),
        ("poly", {"pace": "dylu"}),
        ("polythres", {"threshold": 1}),
        ("delay-compensation", {"strength": 10.0}),
        ("async-buffer", {"outer_lr": 0.2}),  # a run of a few outer steps
    ],
)
def test_a_real_run_learns_and_ends_with_the_same_bits(name: str, options: dict[str, Any]) -> None:
    ends = results(run_processes(train, 3, 3, name, options))
    assert len({summary.digest for summary, _ in ends}) == 1
    assert ends[0][0].version > 5
    assert ends[0][1] < 0.9  # of the loss before

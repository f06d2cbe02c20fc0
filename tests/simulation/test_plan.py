"""Planning: it reproduces known results, and its recommendations have the predicted effect."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import Settings
from lightning_async_localsgd.codecs import FP32
from lightning_async_localsgd.exchange.trade import CHUNK
from lightning_async_localsgd.methods import METHODS, make_method
from lightning_async_localsgd.outer import AsyncBuffer, DelayCompensation, DelayedNesterov, Poly
from lightning_async_localsgd.simulation import Network, Plan, plan, recommend, simulate
from lightning_async_localsgd.simulation.costs import memory_bytes
from lightning_async_localsgd.simulation.plan import TARGET
from lightning_async_localsgd.simulation.recommendation import CODECS, LOCAL_STEPS

SPEEDS = [1 / seconds for seconds in (0.58, 0.75, 1.51, 3.33)]
PARAMETERS = 10_000_000

planned = partial(plan, PARAMETERS, SPEEDS, memory_bandwidth=math.inf)


# ---- time ------------------------------------------------------------------------------------------------------------


def test_nobody_waits_where_messages_take_no_time() -> None:
    here = planned(local_steps=50)
    assert here.utilization == pytest.approx(1)
    assert here.steps_per_second == pytest.approx(sum(SPEEDS))
    assert here.exposed_seconds == pytest.approx([0] * 4)
    assert here.keeps_rounds and here.reaches_target


def test_synchronous_workers_wait_for_the_slowest() -> None:
    here = planned(local_steps=50, **make_method("sync", 4))
    assert here.utilization == pytest.approx(4 * min(SPEEDS) / sum(SPEEDS))
    assert here.round_seconds == pytest.approx(50 / min(SPEEDS))
    assert here.mean_staleness == 0


def test_a_synchronous_round_lasts_as_long_as_its_steps_and_its_exchange() -> None:
    network = Network(latency=0.1, bandwidth=1e7)
    here = planned(network=network, local_steps=50, codec="fp32", **make_method("sync", 4))
    everyone = range(4)
    bell = network.trip(everyone)
    sent = network.reduce_seconds(everyone, everyone, PARAMETERS, FP32())
    exchange = bell + network.header_seconds(everyone) + sent
    assert here.round_seconds == pytest.approx(50 / min(SPEEDS) + exchange)


@pytest.mark.parametrize("method", METHODS)
def test_more_bandwidth_is_never_worse(method: str) -> None:
    settings = make_method(method, 4) | {"overlap": False}
    ladder = [planned(network=Network(0.01, rate), local_steps=50, **settings) for rate in (1e6, 1e7, 1e8, 1e9)]
    utilization = [here.utilization for here in ladder]
    assert all(b > a - 0.005 for a, b in pairwise(utilization))
    assert utilization[-1] > utilization[0]


def test_a_slow_network_makes_rounds_longer_and_nobody_wait() -> None:
    slow = planned(network=Network(bandwidth=1e6), local_steps=10, codec="fp32")
    assert slow.utilization > TARGET and not slow.keeps_rounds and not slow.reaches_target
    assert slow.round_steps == pytest.approx(slow.round_seconds * SPEEDS[0], rel=0.02)
    at_need = planned(network=Network(bandwidth=slow.link_need), local_steps=10, codec="fp32")
    assert at_need.keeps_rounds


def test_by_itself_the_codec_is_one_with_which_rounds_are_kept() -> None:
    fits = {
        codec: planned(network=Network(bandwidth=4e6), local_steps=10, codec=codec)
        for codec in ("fp32", "bf16", "int4")
    }
    assert not fits["fp32"].keeps_rounds and fits["int4"].keeps_rounds
    chosen = planned(network=Network(bandwidth=4e6), local_steps=10)
    assert chosen.codec in ("int8", "int4") and chosen.keeps_rounds
    assert planned(network=Network(bandwidth=1e10), local_steps=10).codec == "fp32"


def test_copies_take_time_where_memory_is_slow() -> None:
    fast, slow = (plan(PARAMETERS, SPEEDS, local_steps=50, memory_bandwidth=rate) for rate in (1e11, 1e9))
    assert slow.utilization < fast.utilization < 1
    assert slow.exchange_seconds > fast.exchange_seconds


def simulate_at_most(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have longer plans simulate several steps as one."""
    for name in ("_MOST_STEPS", "_MOST_STEPS_PER_WORKER"):
        monkeypatch.setattr(sys.modules[Plan.__module__], name, steps)  # by its name one would find the function `plan`


def test_steps_that_are_simulated_as_one_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"network": Network(0.02, 1e8), "local_steps": 200}
    fine = [planned(**settings), planned(overlap=False, **settings)]
    simulate_at_most(500, monkeypatch)
    coarse = [planned(**settings), planned(overlap=False, **settings)]
    for a, b in zip(fine, coarse, strict=True):
        assert b.utilization == pytest.approx(a.utilization, abs=0.01)
        assert b.round_steps == pytest.approx(a.round_steps, rel=0.1)
        assert b.bytes_per_round == pytest.approx(a.bytes_per_round, rel=0.1)  # not all are in each turn


def test_noise_makes_synchronous_workers_wait() -> None:
    equal = partial(plan, PARAMETERS, [1.0] * 4, memory_bandwidth=math.inf, local_steps=20, **make_method("sync", 4))
    assert equal().utilization == pytest.approx(1)
    assert equal(noise=0.5).utilization < 0.99
    assert equal(noise=0.5) == equal(noise=0.5) != equal(noise=0.5, seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_planned(method: str) -> None:
    settings = make_method(method, 4)
    here = planned(network=Network(0.01, 1e8), local_steps=20, **settings)
    waits_for_the_slowest = not settings.get("overlap", True)
    expected = 4 * min(SPEEDS) / sum(SPEEDS) if waits_for_the_slowest else 1
    assert here.utilization == pytest.approx(expected, rel=0.02)  # an exchange takes a hundredth of a round
    assert here.memory > 4 * 4 * PARAMETERS


# ---- traffic ---------------------------------------------------------------------------------------------------------


class Net(L.LightningModule):
    """65,792 parameters and no buffers: a delta is much longer than a header."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(256, 256)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["sync", "dn"])
def test_traffic_is_what_a_simulation_counts(method: str, codec: str) -> None:
    settings: dict[str, Any] = {"local_steps": 4, "codec": codec, **make_method(method, 4)}
    module, network = Net(), Network(0.01, 1e7)
    speeds = [2.0, 2.0, 1.0, 1.0]
    loader = DataLoader(TensorDataset(torch.zeros(32, 256)), batch_size=1)
    result = simulate(module, loader, speeds, 40, network=network, **settings)
    here = plan(sum(p.numel() for p in module.parameters()), speeds, network=network, **settings)
    for worker in range(4):
        rounds = sum(round_.worker == worker for round_ in result.rounds)
        sent, received = result.bytes_sent[worker], result.bytes_received[worker]
        if method == "sync":
            assert (sent, received) == (rounds * here.sent_per_round[worker], rounds * here.received_per_round[worker])
        else:  # a round may come with a turn of its own, or with others in one
            assert sent / rounds == pytest.approx(here.sent_per_round[worker], rel=0.1)
    assert sum(here.sent_per_round) == pytest.approx(sum(here.received_per_round))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({}, 5),
        ({"codec": "bf16"}, 6),  # with the residual
        ({"quorum": 4}, 5),
        ({"outer_optimizer": partial(DelayedNesterov, momentum_activation=0.1)}, 6),
        ({"outer_optimizer": partial(torch.optim.SGD, lr=0.7)}, 4),
        ({"outer_optimizer": partial(torch.optim.SGD, lr=0.7, momentum=0.9)}, 5),
        ({"outer_optimizer": partial(torch.optim.Adam, lr=0.7)}, 6),
        ({"transforms": [Poly()]}, 5),
        ({"transforms": [AsyncBuffer()]}, 6),
        ({"transforms": [DelayCompensation()]}, 5),
    ],
)
def test_memory_is_what_the_state_keeps(settings: dict[str, Any], copies: int) -> None:
    chosen = Settings(**settings)
    codec = next(iter(chosen.codecs().values()))
    messages = 4 * codec.wire_bytes(min(4 * CHUNK, PARAMETERS // 4))
    assert memory_bytes(PARAMETERS, chosen, 4, codec) == 4 * PARAMETERS * copies + messages


# ---- recommendations -------------------------------------------------------------------------------------------------


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where exchanges take minutes: steps by the ten thousand would change no recommendation, and take long."""
    simulate_at_most(500, monkeypatch)


def test_what_is_recommended_reaches_the_target_and_less_does_not() -> None:
    network = Network(0.02, 2e7)
    found = recommend(PARAMETERS, SPEEDS, network=network)
    best = found.best
    assert best is not None and best.reaches_target
    assert f"H = {best.local_steps} with {best.codec}" in found.sentence
    again = plan(PARAMETERS, SPEEDS, network=network, local_steps=best.local_steps, codec=best.codec)
    assert again == best and again.utilization >= TARGET
    assert not any(other.reaches_target for other in found.plans if other.local_steps < best.local_steps)
    assert {(p.codec, p.local_steps) for p in found.plans} == {(c, h) for c in CODECS for h in LOCAL_STEPS}


@pytest.mark.usefixtures("coarse")
def test_where_the_network_is_too_slow_it_says_how_fast_it_must_be() -> None:
    found = recommend(PARAMETERS, SPEEDS, network=Network(0.02, 1e4))
    assert found.best is None
    stated = re.search(r"H = (\d+) with (\w+) needs ([\d.,e+]+) Mbit/s", found.sentence)
    assert stated is not None
    local_steps, codec, mbit = int(stated[1]), stated[2], float(stated[3].replace(",", ""))
    network = Network(0.02, 1.01 * mbit * 1e6 / 8)  # it was rounded
    assert plan(PARAMETERS, SPEEDS, network=network, local_steps=local_steps, codec=codec).reaches_target


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (make_method("sync", 4), "workers wait for each other"),
        ({"memory_bandwidth": 1e6}, "memory bandwidth"),
        ({"network": Network(latency=1e3), "overlap": False}, "overlap"),
    ],
)
def test_where_nothing_helps_it_says_why(options: dict[str, Any], said: str) -> None:
    found = recommend(PARAMETERS, SPEEDS, **options)
    assert found.best is None and said in found.sentence


@pytest.mark.usefixtures("coarse")
def test_of_several_causes_the_one_that_is_shortest_comes_first() -> None:
    slow_link = Network(latency=0.04, bandwidth=1e6)
    found = recommend(1_100_000_000, [3.0, 1.0], network=slow_link)
    assert found.best is None
    stated = re.search(r"H = 500 with (\w+)", found.sentence)
    assert stated is not None
    first, second = found.sentence.split("Besides, ")
    needed = re.search(r"needs ([\d,.]+) Mbit/s", first), re.search(r"needs ([\d,.]+) GB/s", second)
    link, memory = (float(number[1].replace(",", "")) for number in needed if number is not None)
    network = replace(slow_link, bandwidth=1.01 * link * 1e6 / 8)
    settings: dict[str, Any] = {"local_steps": 500, "codec": stated[1], "memory_bandwidth": 1.01 * memory * 1e9}
    assert plan(1_100_000_000, [3.0, 1.0], network=network, **settings).reaches_target
    little_memory = recommend(1_100_000_000, [3.0, 1.0], network=slow_link, memory_bandwidth=1e8)
    assert little_memory.sentence.index("GB/s") < little_memory.sentence.index("Mbit/s")


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"parameters": 0}, "`parameters`"),
        ({"workers": []}, "at least one worker"),
        ({"workers": [1.0, 0.0]}, "speed must be positive"),
        ({"workers": [1.0], "quorum": 2}, "`quorum=2`"),
        ({"workers": [1.0], "network": Network(sites=(0, 1))}, "`sites`"),
        ({"noise": -1.0}, "`deviation`"),
        ({"memory_bandwidth": 0.0}, "`memory_bandwidth`"),
        ({"codec": "int7"}, "`codec`"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(**({"parameters": 1000, "workers": SPEEDS} | arguments))

"""The simulation: its result consists of its workers' training, and the same call gives the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_async_localsgd import make_method
from lightning_async_localsgd.simulation import (
    ChangingDevice,
    Network,
    NoisyDevice,
    Simulation,
    SimulationResult,
    VirtualWorker,
    simulate,
)
from tests.modules import SPEEDS, Batches, Regression, regression_data

TOY = [1 / seconds for seconds in SPEEDS]
PLAIN = partial(torch.optim.SGD, lr=1.0)


class Counter(L.LightningModule):
    """Each local step adds exactly 1 to its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any) -> Tensor:
        return -self.count.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def loader(samples: int = 128, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(regression_data(samples), batch_size=batch_size, shuffle=True)


def final(result: SimulationResult) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in result.state_dict.values()])


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("pace", ["dylu", "fixed"])
@pytest.mark.parametrize("latency", [0.0, 2.0])
def test_no_local_step_is_lost_or_applied_twice(overlap: bool, pace: str, latency: float) -> None:
    # With lr 1 and no momentum an outer update adds the delta as it is.
    result = simulate(
        Counter(),
        loader(),
        TOY,
        40,
        outer_optimizer=PLAIN,
        local_steps=10,
        overlap=overlap,
        pace=pace,
        network=Network(latency=latency),
    )
    steps = result.total_local_steps
    assert 160 <= steps <= 163  # steps that end while an exchange is under way may come on top
    assert steps == sum(update.local_steps for update in result.updates) == final(result).item()
    assert sum(update.samples for update in result.updates) == 4 * steps


@pytest.mark.parametrize(
    ("speeds", "local_steps", "max_steps"),
    [((2, 2, 2, 0.02), 25, 400), ((1, 0.02), 10, 150), ((10, 8, 0.3, 0.05), 20, 300)],
)
def test_a_very_slow_worker_does_not_set_the_pace_of_the_others(
    speeds: tuple[float, ...], local_steps: int, max_steps: int
) -> None:
    result = simulate(Counter(), loader(), speeds, max_steps, local_steps=local_steps)
    assert result.local_steps[-1] > 3
    rounds = [update.local_steps for update in result.updates if update.worker == 0]
    assert max(rounds) <= 2 * local_steps  # a turn may be held open for as long as a round


def test_the_mean_of_a_quorum_moves_the_parameters() -> None:
    result = simulate(Counter(), loader(), TOY, 40, **make_method("sync", 4) | {"outer_optimizer": PLAIN})
    assert result.local_steps == (40,) * 4
    assert final(result).item() == 40
    assert result.max_staleness == 0


def test_equal_workers_with_delayed_nesterov_are_synchronous_diloco() -> None:
    sync = simulate(Regression(), loader(), [2.0] * 4, 60, local_steps=10, **make_method("sync", 4))
    ours = simulate(Regression(), loader(), [2.0] * 4, 60, local_steps=10, overlap=False, **make_method("dn", 4))
    torch.testing.assert_close(final(ours), final(sync), rtol=1e-5, atol=1e-6)
    assert ours.version == 4 * sync.version


@pytest.mark.parametrize("method", ["dn", "poly", "async-buffer", "delay-compensation"])
def test_the_same_call_gives_the_same_bits(method: str) -> None:
    def run(seed: int) -> SimulationResult:
        workers = [NoisyDevice(speed, 0.3) for speed in TOY]
        network = Network(latency=0.1, bandwidth=1e4)
        return simulate(
            Regression(), loader(), workers, 30, local_steps=6, network=network, seed=seed, **make_method(method, 4)
        )

    first, second, other = run(0), run(0), run(1)
    assert (first.digest, first.updates, first.rounds) == (second.digest, second.updates, second.rounds)
    assert torch.equal(final(first), final(second))
    assert other.digest != first.digest


def test_the_module_ends_with_the_global_parameters_in_its_own_tensors() -> None:
    module = Regression()
    before = [parameter.data_ptr() for parameter in module.parameters()]
    result = simulate(module, loader(), TOY, 20, local_steps=5)
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
    for name, tensor in result.state_dict.items():
        assert torch.equal(module.state_dict()[name], tensor)
    assert "log" not in vars(module)


def test_training_lowers_the_loss_and_the_losses_are_those_of_the_rounds() -> None:
    result = simulate(Regression(), loader(), TOY, 100, local_steps=10)
    assert len(result.losses) == len(result.rounds) == len(result.updates)
    assert result.losses[-1].loss < 0.5 * result.losses[0].loss
    assert [point.worker for point in result.losses] == [r.worker for r in result.rounds]


def test_random_numbers_outside_are_left_alone() -> None:
    module = Regression()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    simulate(module, loader(), TOY, 10, local_steps=5)
    assert torch.equal(torch.rand(3), expected)


# ---- Lightning modules ----------------------------------------------------------------------------------------------


class Noisy(Regression):
    """Draws from all generators of random numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return self.loss(batch) * (1 + noise.item())


class Watched(Regression):
    """Notes what it sees in each step; with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.max_steps: set[int] = set()
        self.rates: list[float] = []
        self.batches = 0
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("train_loss", 1.0)
        self.max_steps.add(self.trainer.max_steps)
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.batches += 1
        loss = self.loss((self.norm(batch[0]), batch[1]))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_schedules_count_the_steps_of_the_job() -> None:
    module = Watched()
    simulate(module, loader(), TOY, 20, local_steps=5, trainer_options={"gradient_clip_val": 0.01})
    assert module.max_steps == {20}
    steps = [round(1 / rate) - 1 for rate in module.rates]
    assert steps[0] == 0 and 17 <= max(steps) <= 20


def test_gradients_are_accumulated_within_a_step_but_not_beyond_a_pass() -> None:
    module = Watched()
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01}
    result = simulate(module, loader(), TOY, 20, local_steps=5, trainer_options=options)
    assert result.total_local_steps == 80
    # A shard has 8 batches: steps of 3, 3 and 2, as Lightning makes them.
    assert module.batches == sum(8 * (steps // 3) + 3 * (steps % 3) for steps in result.local_steps)
    assert sum(update.samples for update in result.updates) == 4 * module.batches
    assert result.losses[0].loss == pytest.approx(sum(module.losses[:13]) / 13, rel=0.2)  # not a third of it


class Epochs(Regression):
    """Writes down its hooks, and has a schedule by epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: list[str] = []
        self.epochs: set[int] = set()

    def on_train_start(self) -> None:
        self.hooks.append("train start")

    def on_train_end(self) -> None:
        self.hooks.append("train end")

    def on_train_epoch_end(self) -> None:
        self.hooks.append(f"epoch {self.current_epoch} of {self.trainer.num_training_batches} batches")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch", "frequency": 2}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.optimizers[0].param_groups[0]["lr"] == 0.5 ** (self.current_epoch // 2)
        self.epochs.add(self.current_epoch)
        return 0.01 * self.loss(batch)


def test_epochs_are_each_workers_own_passes() -> None:
    module = Epochs()
    result = simulate(module, loader(), [1.0, 1.0], 80, local_steps=8)
    assert result.local_steps == (80, 80)
    assert module.epochs == set(range(5))  # a shard of two has 16 batches
    assert module.hooks[0] == "train start" and module.hooks[-1] == "train end"
    ended = [f"epoch {epoch} of 16 batches" for epoch in range(4)]
    assert sorted(module.hooks[1:-1]) == sorted(2 * ended)


def test_layers_in_evaluation_mode_stay_so() -> None:
    module = Watched()
    module.norm.eval()
    result = simulate(
        module,
        loader(),
        TOY,
        20,
        local_steps=5,
        evaluate=lambda _: {},
        evaluate_every=5,
        trainer_options={"gradient_clip_val": 0.01},
    )
    assert torch.equal(result.state_dict["norm.running_mean"], torch.zeros(8))
    assert not module.norm.training and module.net.training


def test_training_that_changes_what_workers_share_is_refused() -> None:
    class Teacher(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.average = nn.Parameter(torch.zeros(1), requires_grad=False)

        def on_train_batch_end(self, *_: Any) -> None:
            self.average.add_(1)

    with pytest.raises(RuntimeError, match=r"'average'.*register it as a buffer"):
        simulate(Teacher(), loader(), TOY, 20, local_steps=5)


def test_statistics_of_batch_norm_are_shared_and_counters_follow_worker_0() -> None:
    module = Watched()
    module.norm.momentum = 0.5
    result = simulate(module, loader(), TOY, 40, local_steps=5, trainer_options={"gradient_clip_val": 0.01})
    variance = result.state_dict["norm.running_var"]
    assert variance.min() > 0.2 and variance.max() < 3  # inputs are standard normal
    assert module.norm.num_batches_tracked == result.local_steps[0]


def test_what_validation_logs_is_an_evaluation() -> None:
    validation = DataLoader(regression_data(32, seed=5), batch_size=8)
    module = Regression()
    result = simulate(module, loader(), TOY, 40, local_steps=5, val_dataloaders=validation, evaluate_every=10)
    assert len(result.evaluations) == 5
    assert [set(evaluation.metrics) for evaluation in result.evaluations] == [{"val_loss"}] * 5
    losses = torch.stack([module.loss(batch) for batch in validation])
    assert result.evaluations[-1].metrics["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result.evaluations[0].local_steps == 0 and result.evaluations[-1].local_steps == 160


def test_evaluating_changes_nothing() -> None:
    def measure(module: L.LightningModule) -> dict[str, float]:
        torch.rand(3), random.random(), np.random.rand()
        return {"norm": float(sum(p.norm() for p in module.parameters()))}

    plain = simulate(Noisy(), loader(), TOY, 20, local_steps=5)
    evaluated = simulate(Noisy(), loader(), TOY, 20, local_steps=5, evaluate=measure, evaluate_every=1)
    assert evaluated.digest == plain.digest
    assert len(evaluated.evaluations) > 5


def test_a_data_module_brings_its_data() -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return DataLoader(regression_data(32), batch_size=8)

    result = simulate(Regression(), Data(), TOY, 20, local_steps=5)
    assert result.digest == simulate(Regression(), loader(), TOY, 20, local_steps=5).digest
    assert len(result.evaluations) == 2


def test_a_function_of_rank_gives_each_worker_its_own_data() -> None:
    asked = []

    def own(rank: int, size: int) -> Iterator[Any] | DataLoader[Any]:
        asked.append((rank, size))
        return DataLoader(Batches(rank), batch_size=None)

    result = simulate(Regression(), own, TOY, 20, local_steps=5)
    assert sorted(asked) == [(rank, 4) for rank in range(4)]
    assert result.total_local_steps == 80


def test_a_delta_that_is_not_finite_is_dropped_and_its_worker_starts_again() -> None:
    class Poisoned(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return self.loss(batch) * (float("nan") if self.calls == 33 else 1.0)

    result = simulate(Poisoned(), loader(), TOY, 60, local_steps=10)
    assert sum(result.dropped) == 1
    assert final(result).isfinite().all()
    assert result.losses[-1].loss < result.losses[0].loss
    assert sum(update.local_steps for update in result.updates) < result.total_local_steps


# ---- joining, leaving and their cost --------------------------------------------------------------------------------


def test_workers_join_and_leave() -> None:
    workers = [1.0, 1.0, VirtualWorker(1.0, joins=20.0), VirtualWorker(1.0, leaves=24.5)]
    result = simulate(Counter(), loader(), workers, 30, outer_optimizer=PLAIN, local_steps=5, overlap=False)
    assert min(r.begin for r in result.rounds if r.worker == 2) >= 20
    assert max(r.end for r in result.rounds if r.worker == 3) <= 24.5
    assert result.total_local_steps == 120
    lost = result.local_steps[3] - sum(update.local_steps for update in result.updates if update.worker == 3)
    assert 0 < lost < 5  # what it had not pushed
    assert final(result).item() == 120 - lost
    present = result.seconds - 20
    assert 0.9 * present <= result.local_steps[2] <= present


def test_who_is_still_to_come_finds_the_work_that_all_others_have_left() -> None:
    workers = [VirtualWorker(1.0, leaves=10.5), VirtualWorker(1.0, joins=20.0)]
    result = simulate(Counter(), loader(), workers, 30, outer_optimizer=PLAIN, local_steps=5, overlap=False)
    assert result.local_steps == (10, 50)
    assert result.utilization == pytest.approx(60 / 60.5, abs=0.01)
    nobody = simulate(Counter(), loader(), [VirtualWorker(1.0, leaves=10.5)], 30, local_steps=5)
    assert nobody.local_steps == (10,)


def test_synchronous_workers_go_on_without_one_that_leaves() -> None:
    workers = [1.0, 1.0, VirtualWorker(1.0, leaves=12.5)]
    result = simulate(Counter(), loader(), workers, 40, local_steps=5, **make_method("sync", 3))
    assert result.local_steps == (40, 40, 12)


HELD: dict[str, Any] = {"local_steps": 10, "pace": "fixed", "overlap": False, "grace_period": 2.0}


def test_a_turn_is_held_open_for_a_worker_that_is_about_to_push() -> None:
    result = simulate(Counter(), loader(), [1.0, 1 / 1.04], 100, **HELD)
    first = [update for update in result.updates if update.round == 0]
    assert [update.time for update in first] == pytest.approx([10.4, 10.4])  # worker 0 has pushed at 10
    assert [update.worker for update in first] == [0, 1]


def test_a_turn_is_not_held_open_for_a_worker_that_has_left_before_its_push() -> None:
    result = simulate(Counter(), loader(), [1.0, VirtualWorker(1 / 1.04, leaves=9.8)], 100, **HELD)
    assert [update.time for update in result.updates[:2]] == pytest.approx([10.0, 20.0])


def test_a_device_that_becomes_slower_makes_shorter_rounds() -> None:
    workers = [1.0, ChangingDevice(((0.0, 1.0), (100.0, 0.25)))]
    result = simulate(Counter(), loader(), workers, 200, local_steps=20, overlap=False)
    steps = [(r.begin, r.local_steps) for r in result.rounds if r.worker == 1]
    assert {n for begin, n in steps if begin < 80} == {20}
    assert all(n <= 6 for begin, n in steps[:-1] if begin > 140)


def test_only_a_worker_that_trains_on_does_not_wait_for_the_network() -> None:
    network = Network(latency=0.5, bandwidth=1e4)
    overlap, waiting = (
        simulate(Regression(), loader(), TOY, 200, local_steps=20, network=network, overlap=overlap, grace_period=0.1)
        for overlap in (True, False)
    )
    assert sum(overlap.waiting_seconds) < 0.2 * sum(waiting.waiting_seconds)  # at the end of the budget alone
    assert overlap.utilization > 0.95 > waiting.utilization
    assert overlap.seconds < waiting.seconds


@pytest.mark.parametrize("method", ["dn", "sync"])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_worker_is_in_a_round_or_waits(method: str, overlap: bool) -> None:
    settings = make_method(method, 4) | {"overlap": overlap}
    result = simulate(Counter(), loader(), TOY, 43, local_steps=10, network=Network(latency=3.0), **settings)
    for worker in range(4):
        rounds = [r for r in result.rounds if r.worker == worker]
        waits = [w for w in result.waits if w.worker == worker]
        assert all(after.begin >= (before.end if overlap else before.adopted) for before, after in pairwise(rounds))
        within = sum(w.end - w.begin for r in rounds for w in waits if r.begin <= w.begin < w.end <= r.end)
        assert sum(r.end - r.begin for r in rounds) - within == pytest.approx(result.busy_seconds[worker])
        assert sum(w.end - w.begin for w in waits) == pytest.approx(result.waiting_seconds[worker])
        before_the_end = rounds[-1].end - sum(w.end - w.begin for w in waits)
        assert before_the_end == pytest.approx(result.busy_seconds[worker])


def test_traffic_is_that_of_the_codec() -> None:
    fp32, bf16 = (simulate(Regression(), loader(), TOY, 40, local_steps=10, codec=codec) for codec in ("fp32", "bf16"))
    assert sum(fp32.bytes_sent) == pytest.approx(sum(fp32.bytes_received), abs=4 * len(fp32.updates))  # rounded
    assert len(fp32.updates) == len(bf16.updates)
    parameters = 8 * 16 + 16 + 16 + 16  # the layout rounds the last bias, of one element, up to 16
    deltas = 2 * (sum(fp32.bytes_sent) - sum(bf16.bytes_sent))  # the headers are the same
    gathered = 4 * 3 * parameters * len(fp32.updates)  # if each delta went to each worker
    assert gathered / 2 <= deltas <= gathered


def test_ended_early_it_keeps_what_there_is() -> None:
    module = Regression()
    seen: list[Any] = []

    def end(*what: Any) -> None:
        seen.append(what)
        if len(seen) == 7:
            raise KeyboardInterrupt

    simulation = Simulation(module, loader(), TOY, 1000, local_steps=5, on_round=end)
    with pytest.raises(KeyboardInterrupt):
        simulation.run()
    result = simulation.result()
    assert len(result.rounds) == 7 and result.seconds == max(r.adopted for r in result.rounds)
    assert result.state_dict.keys() == module.state_dict().keys()
    for name, tensor in result.state_dict.items():
        assert torch.equal(module.state_dict()[name], tensor)


# ---- bad input ------------------------------------------------------------------------------------------------------


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Plateau(Regression):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": []}, "at least one worker"),
        ({"workers": [1.0, 0.0]}, "speed must be positive"),
        ({"workers": [1.0, "fast"]}, "a speed in local steps per second or a device"),
        ({"max_steps": 2}, "less than one round"),
        ({"quorum": 9}, "larger than the number of workers"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"network": Network(sites=(0, 1))}, "sites"),
        ({"module": Manual()}, "automatic_optimization"),
        ({"module": Plateau()}, "ReduceLROnPlateau"),
        ({"trainer_options": {"devices": 2}}, "devices"),
        ({"trainer_options": {"limit_train_batches": 2}}, "limit_train_batches"),
        ({"data": DataLoader(Batches(0), batch_size=None)}, "function of rank and size"),
        ({"data": DataLoader(TensorDataset(torch.zeros(0, 8)), batch_size=4)}, "no batch"),
        ({"pace": "quick"}, "pace"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"module": Regression(), "data": loader(), "workers": TOY, "max_steps": 20}
    with pytest.raises(ValueError, match=message):
        simulate(**arguments | {"local_steps": 10} | changes)

"""The strategy under Lightning's Trainer, in real processes."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_async_localsgd import AsyncLocalSGDStrategy
from lightning_async_localsgd.data.loader import WorkerLoader
from lightning_async_localsgd.outer import DelayedNesterov
from tests.modules import (
    SPEEDS,
    Batches,
    Record,
    Regression,
    checkpoints,
    make_net,
    make_trainer,
    regression_data,
    stream,
)
from tests.processes import results, run_processes


def strategy(**kwargs: Any) -> AsyncLocalSGDStrategy:
    return AsyncLocalSGDStrategy(**({"local_steps": 5, "timeout": timedelta(seconds=30)} | kwargs))


def parameters(module: nn.Module) -> list[float]:
    return nn.utils.parameters_to_vector(module.parameters()).tolist()


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def equal_workers(rank: int, size: int, quorum: int) -> Any:
    # The grace window is long enough for all; it closes as soon as the last worker has pushed.
    plan = strategy(
        local_steps=10,
        outer_optimizer=DelayedNesterov,
        overlap=False,
        quorum=quorum,
        grace_period=20.0,
        pace="fixed",
        budget="per_worker",
    )
    module = Regression()
    make_trainer(size, plan, max_steps=50).fit(module, stream(rank))
    return parameters(module), plan.summary


def synchronous_diloco(workers: int, local_steps: int, rounds: int) -> list[float]:
    """DiLoCo (Douillard et al. 2023, Algorithm 1) in one process, written from the paper."""
    shared = make_net()
    outer = torch.optim.SGD(shared.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    replicas = [make_net() for _ in range(workers)]
    inner = [torch.optim.AdamW(replica.parameters(), lr=1e-2) for replica in replicas]
    batches = [iter(Batches(100 + w)) for w in range(workers)]
    for _ in range(rounds):
        for replica, optimizer, stream_of_worker in zip(replicas, inner, batches, strict=True):
            replica.load_state_dict(shared.state_dict())
            for _ in range(local_steps):
                x, y = next(stream_of_worker)
                optimizer.zero_grad()
                nn.functional.mse_loss(replica(x), y).backward()
                optimizer.step()
        for p, *own in zip(shared.parameters(), *(r.parameters() for r in replicas), strict=True):
            p.grad = torch.stack([p.detach() - q.detach() for q in own]).mean(0)
        outer.step()
    return parameters(shared)


@pytest.mark.parametrize("quorum", [1, 4])
def test_equal_workers_are_synchronous_diloco(quorum: int) -> None:
    ends = results(run_processes(equal_workers, 4, 4, quorum))
    expected = torch.tensor(synchronous_diloco(workers=4, local_steps=10, rounds=5))
    for values, summary in ends:
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-4, atol=1e-5)
        assert summary.local_steps == (50, 50, 50, 50)
        assert summary.version == (20 if quorum == 1 else 5)
        assert summary.digest == ends[0][1].digest
    assert (torch.tensor(ends[0][0]) - nn.utils.parameters_to_vector(make_net().parameters())).abs().max() > 0.05


def unequal_workers(rank: int, size: int, overlap: bool) -> Any:
    plan, record = strategy(local_steps=20, overlap=overlap), Record()
    module = Regression([seconds / 60 for seconds in SPEEDS])
    trainer = make_trainer(size, plan, max_steps=60, callbacks=[record])
    trainer.fit(module, stream(rank))
    return plan.summary, parameters(module), record.updates, trainer.global_step


@pytest.mark.parametrize("overlap", [True, False])
def test_unequal_workers_agree_and_spend_the_budget(overlap: bool) -> None:
    summaries, values, logs, global_steps = zip(*results(run_processes(unequal_workers, 4, 4, overlap)), strict=True)
    assert all(s.digest == summaries[0].digest for s in summaries)
    assert all(v == values[0] for v in values)
    assert all(log == logs[0] for log in logs)
    assert 0 <= summaries[0].total_local_steps - 240 <= 20
    assert summaries[0].local_steps == global_steps
    assert global_steps[0] > global_steps[3]
    assert summaries[0].max_staleness <= 12


# ---- Lightning's own counting ----------------------------------------------------------------------------------------


class Scheduled(Regression):
    """Counts the steps of its scheduler, which would fail if stepped past its end; reads ``max_steps`` as it trains."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.max_steps == 40
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=self.trainer.max_steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def scheduled(rank: int, size: int, logs: str) -> Any:
    module = Scheduled([0.004, 0.02])
    monitor = LearningRateMonitor(logging_interval="step")
    trainer = make_trainer(
        size, strategy(), max_steps=40, callbacks=[monitor], logger=L.pytorch.loggers.CSVLogger(logs)
    )
    trainer.fit(module, stream(rank))
    scheduler = trainer.lr_scheduler_configs[0]
    return scheduler.scheduler.last_epoch, scheduler.frequency, trainer.max_steps, trainer.global_step


def test_step_schedulers_count_the_steps_of_the_job(tmp_path: Path) -> None:
    fast, slow = results(run_processes(scheduled, 2, 2, str(tmp_path)))
    assert fast[:3] == slow[:3] == (40, 1, 40)
    assert fast[3] > 40 > slow[3]


class Manual(Regression):
    """Two optimizers by hand, on every second batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.other = make_net(seed=3)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        time.sleep(0.002)
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (self.net, self.other)]


def manual(rank: int, size: int) -> Any:
    plan, module = strategy(), Manual()
    trainer = make_trainer(size, plan, max_steps=20)
    trainer.fit(module, stream(rank))
    return plan.summary, trainer.fit_loop.epoch_loop.total_batch_idx + 1, parameters(module)


def test_a_local_step_is_a_batch_in_which_an_optimizer_stepped() -> None:
    ends = results(run_processes(manual, 2, 2))
    assert abs(ends[0][0].total_local_steps - 40) <= 5
    for rank, (summary, batches, values) in enumerate(ends):
        assert batches == 2 * summary.local_steps[rank]
        assert values == ends[0][2]


def accumulating(rank: int, size: int) -> Any:
    plan = strategy()
    trainer = make_trainer(size, plan, max_steps=10, accumulate_grad_batches=3)
    trainer.fit(Regression([0.002]), stream(rank))
    return plan.summary, trainer.fit_loop.epoch_loop.total_batch_idx + 1


def test_accumulated_batches_are_one_local_step() -> None:
    for rank, (summary, batches) in enumerate(results(run_processes(accumulating, 2, 2))):
        assert batches == 3 * summary.local_steps[rank]


def resumed(rank: int, size: int, folder: str) -> Any:
    pauses = [0.02, 0.004]  # worker 0, whose step count is in the checkpoint, is the slow one
    save = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = make_trainer(size, strategy(), max_steps=40, callbacks=[save], enable_checkpointing=True)
    trainer.fit(Scheduled(pauses), stream(rank))
    plan, module = strategy(), Scheduled(pauses)
    trainer = make_trainer(size, plan, max_steps=40)
    path = in_the_middle(folder)
    trainer.fit(module, stream(rank), ckpt_path=path)
    again = plan.summary.total_local_steps
    trainer.fit(module, stream(rank), ckpt_path=path)
    return again, plan.summary.total_local_steps, trainer.lr_scheduler_configs[0].scheduler.last_epoch


def in_the_middle(folder: str | Path) -> Path:
    saved = checkpoints(folder)
    return saved[len(saved) // 2]


def test_a_resumed_run_counts_the_steps_of_the_job(tmp_path: Path) -> None:
    ends = results(run_processes(resumed, 2, 2, str(tmp_path)))
    saved = torch.load(in_the_middle(tmp_path), weights_only=True)
    assert 0 < saved["global_step"] < saved["async_localsgd"]["job_steps"] < 40
    for first, second, scheduler_steps in ends:
        assert abs(first - 80) <= 5 and abs(second - 80) <= 5
        assert scheduler_steps == 40


def early_end(rank: int, size: int) -> Any:
    plan = strategy()
    trainer = make_trainer(size, plan, max_steps=100, max_epochs=1, limit_train_batches=10 if rank else 1000)
    trainer.fit(Regression([0.004]), stream(rank))
    return plan.summary


def test_a_worker_that_runs_out_of_data_leaves_its_steps_to_the_others() -> None:
    summary = results(run_processes(early_end, 2, 2))[0]
    assert summary.local_steps[1] == 10
    assert abs(summary.total_local_steps - 200) <= 5


def epochs(rank: int, size: int) -> Any:
    plan, module = strategy(), Regression([0.001, 0.004])
    trainer = make_trainer(size, plan, max_epochs=2, use_distributed_sampler=False)
    trainer.fit(module, DataLoader(regression_data(32), batch_size=4, shuffle=True))
    return plan.summary, len(module.seen), trainer.current_epoch, parameters(module)


def test_epochs_over_loaders_of_the_users_are_each_workers_own_and_nobody_leaves_early() -> None:
    ends = results(run_processes(epochs, 2, 2))
    assert ends[0][0].digest == ends[1][0].digest and ends[0][3] == ends[1][3]
    for summary, seen, epoch, _ in ends:
        assert (seen, epoch, summary.local_steps) == (64, 2, (16, 16))


class StopsItself(Regression):
    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_rank == 0 and self.trainer.global_step == 11:
            self.trainer.should_stop = True


def stopping(rank: int, size: int) -> Any:
    plan = strategy()
    trainer = make_trainer(size, plan, max_steps=10_000)
    trainer.fit(StopsItself([0.002]), stream(rank))
    return plan.summary, trainer.global_step


def test_should_stop_in_one_worker_ends_all() -> None:
    (summary, steps), (other, _) = results(run_processes(stopping, 2, 2))
    assert steps == 11
    assert summary.digest == other.digest and max(summary.local_steps) < 500


# ---- data and modules ------------------------------------------------------------------------------------------------


def sharded(rank: int, size: int, use_distributed_sampler: bool) -> Any:
    module = Regression([0.002])
    trainer = make_trainer(
        size, strategy(budget="per_worker"), max_steps=12, use_distributed_sampler=use_distributed_sampler
    )
    trainer.fit(module, DataLoader(regression_data(96), batch_size=4, shuffle=True, num_workers=0))
    loader = trainer.train_dataloader
    return module.seen, isinstance(loader, WorkerLoader), len(loader)


def test_shard_sampling_is_put_under_a_map_style_loader() -> None:
    ends = results(run_processes(sharded, 2, 2, True))
    for seen, is_sharded, length in ends:
        assert is_sharded and length == 12
        assert len(set(seen)) == len(seen) == 48
    assert set(ends[0][0]) != set(ends[1][0])
    assert sorted(ends[0][0]) != ends[0][0]  # still shuffled


class Blocks(BatchSampler):
    """A batch sampler of the user's own."""


def batch_sampled(rank: int, size: int) -> Any:
    data = regression_data(96)
    module = Regression([0.002])
    loader = DataLoader(data, batch_sampler=Blocks(SequentialSampler(data), batch_size=4, drop_last=False))
    make_trainer(size, strategy(budget="per_worker"), max_steps=12).fit(module, loader)
    return module.seen


def test_shard_sampling_is_put_under_a_batch_sampler() -> None:
    first, second = results(run_processes(batch_sampled, 2, 2))
    assert len(first) == len(second) == 48
    assert first != second


def test_a_loader_that_the_user_shards_is_left_alone() -> None:
    for seen, is_sharded, length in results(run_processes(sharded, 2, 2, False)):
        assert not is_sharded and length == 24 and len(set(seen)) == 48


class PartlyFrozen(Regression):
    """A frozen layer, tied weights and BatchNorm."""

    def __init__(self) -> None:
        super().__init__([0.002])
        self.net = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1)
        )
        self.net[0].requires_grad_(False)
        self.net[4].weight = self.net[2].weight


def partly_frozen(rank: int, size: int, checkpoint: str) -> Any:
    torch.manual_seed(rank if rank else 7)
    module, plan = PartlyFrozen(), strategy()
    save = ModelCheckpoint(dirpath=checkpoint, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    trainer = make_trainer(size, plan, max_steps=30, callbacks=[save], enable_checkpointing=True)
    trainer.fit(module, stream(rank, batch_size=8))
    assert module.net[4].weight is module.net[2].weight
    buffers = {name: b.tolist() for name, b in module.named_buffers() if b.is_floating_point()}
    trained = {name: p.tolist() for name, p in module.named_parameters()}
    trainer.save_checkpoint(f"{checkpoint}/end.ckpt")
    return buffers, trained, plan.summary


def test_frozen_tied_and_normalized_layers(tmp_path: Path) -> None:
    ends = results(run_processes(partly_frozen, 2, 2, str(tmp_path)))
    assert ends[0][:2] == ends[1][:2]
    torch.manual_seed(7)
    assert ends[0][1]["net.0.weight"] == PartlyFrozen().net[0].weight.tolist()  # as worker 0 had it, on both
    assert ends[0][0]["net.1.running_mean"] != [0.0] * 8
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert state["net.2.weight"].tolist() == ends[0][1]["net.2.weight"] == state["net.4.weight"].tolist()


def checkpointed(rank: int, size: int, folder: str) -> Any:
    module, plan = Regression([0.002]), strategy(quorum=2, pace="fixed", overlap=False)
    seen: dict[int, list[float]] = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            assert plan.worker is not None
            flat = [t.flatten() for t in plan.worker.global_tensors().values()]
            seen[trainer.global_step] = torch.cat(flat).tolist()

    save = ModelCheckpoint(dirpath=folder, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    make_trainer(size, plan, max_steps=20, callbacks=[Watch(), save], enable_checkpointing=True).fit(
        module, stream(rank)
    )
    return seen


def test_checkpoints_hold_the_global_model(tmp_path: Path) -> None:
    seen = results(run_processes(checkpointed, 2, 2, str(tmp_path)))[0]
    loaded = Regression.load_from_checkpoint(tmp_path / "step=7.ckpt", map_location="cpu")
    assert parameters(loaded) == seen[7] != seen[14]


# ---- around fit ------------------------------------------------------------------------------------------------------


def around_fit(rank: int, size: int) -> Any:
    module, plan = Regression([0.002]), strategy()
    trainer = make_trainer(size, plan, max_steps=30, limit_val_batches=1.0)
    loader = DataLoader(regression_data(40), batch_size=4)
    before = trainer.validate(module, loader, verbose=False)[0]["val_loss"]
    assert not dist.is_initialized()
    trainer.fit(module, stream(rank))
    assert not dist.is_initialized()
    after = trainer.validate(module, loader, verbose=False)[0]["val_loss"]
    with torch.no_grad():
        whole = float(module.loss(next(iter(DataLoader(regression_data(40), batch_size=40)))))
    return before, after, whole, (trainer.world_size, trainer.global_rank, trainer.is_global_zero)


def test_validation_outside_fit_is_sharded_and_reduced_over_the_job() -> None:
    ends = results(run_processes(around_fit, 2, 2))
    for rank, (before, after, whole, identity) in enumerate(ends):
        assert after == pytest.approx(whole, rel=1e-5)
        assert after != before
        assert (before, after) == ends[0][:2]
        assert identity == (2, rank, rank == 0)


def fitting_twice(rank: int, size: int) -> Any:
    module, plan = Regression([0.001, 0.005]), strategy()
    trainer = make_trainer(size, plan, max_steps=20)
    trainer.fit(module, stream(rank))
    first = plan.summary
    trainer.fit(module, stream(rank))  # as with any strategy: the steps are spent
    second = plan.summary
    trainer = make_trainer(size, strategy(), max_steps=10)
    trainer.fit(module, stream(rank))
    return first, second, trainer.strategy.summary


def test_fit_can_be_called_again() -> None:
    (first, second, third), other = results(run_processes(fitting_twice, 2, 2))
    assert second.total_local_steps == 0
    assert abs(third.total_local_steps - 20) <= 5
    assert [s.digest for s in other] == [s.digest for s in (first, second, third)]


class FailsOnRankOne(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_rank == 1 and batch_idx == 12:
            raise ZeroDivisionError("a bug in the user's code")
        return super().training_step(batch, batch_idx)


def failing(rank: int, size: int) -> None:
    make_trainer(size, strategy(), max_steps=10_000).fit(FailsOnRankOne([0.002]), stream(rank))


def test_an_exception_in_one_worker_ends_the_others() -> None:
    outcomes = run_processes(failing, 3, 3)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1, 1]
    assert "ZeroDivisionError" in outcomes[1].error
    for outcome in (outcomes[0], outcomes[2]):
        assert "PeerAbortedError" in outcome.error and "a bug in the user's code" in outcome.error


def refused(rank: int, case: str) -> None:
    if case == "quorum":
        make_trainer(2, strategy(quorum=3), max_steps=1).fit(Regression(), stream(rank))
    elif case == "frozen":
        make_trainer(2, strategy(), max_steps=1).fit(Regression().requires_grad_(False), stream(rank))
    elif case == "activation":
        outer = partial(_delayed_nesterov, momentum_activation=0.9)
        make_trainer(2, strategy(outer_optimizer=outer), max_steps=1).fit(Regression(), stream(rank))
    elif case == "model":
        module = Regression()
        module.net.append(nn.Linear(1, 1 + rank))
        make_trainer(2, strategy(), max_steps=1).fit(module, stream(rank))
    elif case == "steps":
        make_trainer(2, strategy(), max_steps=1 + rank).fit(Regression(), stream(rank))


def _delayed_nesterov(params: Any, **kwargs: Any) -> torch.optim.Optimizer:

    return DelayedNesterov(params, **kwargs)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("quorum", "`quorum=3` is larger than the number of workers, 2"),
        ("frozen", "no trainable parameters"),
        ("activation", "`momentum_activation` must be between 0 and 1/buffer_size = 0.5"),
        ("model", "`model` is"),
        ("steps", "`max_steps` is 1 against 2"),
    ],
)
def test_impossible_runs_are_refused_at_the_start_on_every_worker(case: str, text: str) -> None:
    for outcome in run_processes(refused, 2, case):
        assert outcome.exitcode == 1 and text in outcome.error


def with_default_group(rank: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    make_trainer(2, strategy(), max_steps=1).fit(Regression(), stream(rank))


def test_a_default_process_group_over_all_workers_is_refused() -> None:
    for outcome in run_processes(with_default_group, 2):
        assert "destroy_process_group()" in outcome.error


def test_the_name_is_registered() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="async_localsgd", logger=False)
    assert isinstance(trainer.strategy, AsyncLocalSGDStrategy)

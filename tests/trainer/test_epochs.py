"""An epoch is one pass over the data by all workers together, whatever their speeds; also when it is resumed."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler, TensorDataset

from lightning_async_localsgd import AsyncLocalSGDStrategy
from tests import pacing
from tests.modules import FEATURES, Record, Regression, complete_checkpoints, make_trainer, regression_data, stream
from tests.processes import results, run_processes

SAMPLES = 102


class Watched(Regression):
    """Notes the epoch and index of each sample it trains on; a batch takes rank 0 ``pauses[0]`` seconds, ..."""

    def __init__(self, pauses: Sequence[float]) -> None:
        super().__init__(pauses)
        self.trained: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pacing.step(self.pauses[self.trainer.global_rank])
        if isinstance(batch[2], Tensor):
            self.trained += [(self.trainer.current_epoch, i) for i in batch[2].reshape(-1).tolist()]
        return self.loss(batch)


class ByLength(BatchSampler):
    """A batch sampler of the user's own, with batches of two sizes."""

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.sampler)
        size = self.batch_size
        while batch := list(islice(indices, size)):
            yield batch
            size = 3 * self.batch_size // size  # 1, 3, 1, ... times


class AnyOrder(Sampler[int]):
    """A sampler of the user's own that draws from a global generator."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size).tolist())


DATA = regression_data(SAMPLES)
LOADERS = {
    "shuffled": lambda: DataLoader(DATA, batch_size=4, shuffle=True),
    "in processes": lambda: DataLoader(
        DATA, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    ),
    "drop_last": lambda: DataLoader(DATA, batch_size=4, drop_last=True),
    "batch_sampler": lambda: DataLoader(DATA, batch_sampler=ByLength(SequentialSampler(DATA), 2, False)),
    "sampler": lambda: DataLoader(DATA, batch_size=4, sampler=AnyOrder(SAMPLES)),
    "unbatched": lambda: DataLoader(DATA, batch_size=None, shuffle=True),
}


def strategy(**kwargs: Any) -> AsyncLocalSGDStrategy:
    return AsyncLocalSGDStrategy(local_steps=5, timeout=timedelta(seconds=30), **kwargs)


def train(rank: int, size: int, loader: str, pauses: Sequence[float], options: dict[str, Any]) -> Any:
    module, plan = Watched(pauses), strategy()
    trainer = make_trainer(size, plan, max_epochs=3, **options)
    data = LOADERS[loader]()
    before = type(data.batch_sampler), type(data.sampler)
    trainer.fit(module, data)
    assert (type(data.batch_sampler), type(data.sampler)) == before  # the user's own loader is as it was
    return module.trained, plan.summary, trainer.current_epoch, trainer.num_training_batches


def together(ends: list[Any]) -> dict[int, list[int]]:
    """By epoch, the samples that all workers have trained on."""
    epochs: dict[int, list[int]] = {}
    for trained, *_ in ends:
        for epoch, sample in trained:
            epochs.setdefault(epoch, []).append(sample)
    return epochs


@pytest.mark.parametrize("loader", LOADERS)
def test_each_sample_is_drawn_once_per_epoch(loader: str) -> None:
    ends = results(run_processes(train, 2, 2, loader, (0.002, 0.06), {}))
    epochs = together(ends)
    assert set(epochs) == {0, 1, 2}
    for samples in epochs.values():
        assert len(samples) == len(set(samples)) == (100 if loader == "drop_last" else SAMPLES)
    assert len(ends[0][0]) > len(ends[1][0]) > 0
    assert ends[0][1].digest == ends[1][1].digest
    assert [epoch for _, _, epoch, _ in ends] == [3, 3]
    if loader in ("shuffled", "in processes"):
        first = [sample for epoch, sample in ends[0][0] if epoch == 0]
        assert first != sorted(first)


def test_accumulation_ends_with_the_epoch() -> None:
    ends = results(run_processes(train, 2, 2, "shuffled", (0.002, 0.01), {"accumulate_grad_batches": 4}))
    epochs = together(ends)
    assert set(epochs) == {0, 1, 2}
    for samples in epochs.values():
        assert sorted(samples) == list(range(SAMPLES))
    for rank, (trained, summary, *_) in enumerate(ends):
        batches = [-(-len([e for e, _ in trained if e == epoch]) // 4) for epoch in range(3)]
        assert summary.local_steps[rank] == sum(-(-b // 4) for b in batches)


@pytest.mark.parametrize(("limit", "batches"), [(5, 10), (0.5, 12)])
def test_limited_epochs_are_shared_too(limit: float, batches: int) -> None:
    ends = results(run_processes(train, 2, 2, "shuffled", (0.002, 0.01), {"limit_train_batches": limit}))
    epochs = together(ends)
    assert set(epochs) == {0, 1, 2}
    for samples in epochs.values():
        assert len(samples) == len(set(samples)) == 4 * batches


class Validated(Watched):
    """Notes how much worker 0's job had trained at each validation, and steps a schedule with the planned length."""

    def __init__(self, pauses: Sequence[float]) -> None:
        super().__init__(pauses)
        self.validations: list[int] = []

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations.append(self.trainer.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        planned = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=planned)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def validate(rank: int, size: int, pauses: Sequence[float], options: dict[str, Any]) -> Any:
    module = Validated(pauses)
    trainer = make_trainer(size, strategy(), max_epochs=3, **options)
    trainer.fit(module, LOADERS["shuffled"](), DataLoader(regression_data(8), batch_size=4))
    schedule = trainer.lr_scheduler_configs[0].scheduler
    return module.trained, module.validations, schedule.last_epoch, schedule.total_steps


@pytest.mark.parametrize("pauses", [(0.002, 0.02), (0.02, 0.002)])
@pytest.mark.parametrize(("options", "validations"), [({}, 1), ({"val_check_interval": 0.5}, 2)])
def test_validation_comes_with_the_jobs_epochs(
    pauses: tuple[float, float], options: dict[str, Any], validations: int
) -> None:
    ends = results(run_processes(validate, 2, 2, pauses, options))
    for samples in together(ends).values():
        assert sorted(samples) == list(range(SAMPLES))
    counts = Counter(ends[0][1])
    assert set(counts) == {0, 1, 2} and ends[1][1] == []
    # A slow worker 0 may find that several intervals have passed with its last batch.
    assert all(1 <= n <= validations for n in counts.values())
    if pauses[0] < pauses[1]:
        assert set(counts.values()) == {validations}
    for *_, steps, planned in ends:
        assert 0.8 * planned <= steps <= planned == 3 * 13


def resized(size: int) -> TensorDataset:
    return regression_data(size)


class Pairs(Watched):
    """Trains on two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = [super(Pairs, self).training_step(b, batch_idx) for b in batch if b is not None]
        return torch.stack(losses).mean()


def combined(rank: int, size: int, mode: str) -> Any:
    module = Pairs((0.002, 0.01))
    long, short = resized(80), resized(24)
    short.tensors[2].add_(1000)
    loaders = CombinedLoader([DataLoader(long, 4, shuffle=True), DataLoader(short, 4, shuffle=True)], mode)
    make_trainer(size, strategy(), max_epochs=2).fit(module, loaders)
    return (module.trained,)


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
def test_several_loaders_are_shared_too(mode: str) -> None:
    epochs = together(results(run_processes(combined, 2, 2, mode)))
    assert set(epochs) == {0, 1}
    for samples in epochs.values():
        long = Counter(s for s in samples if s < 1000)
        short = Counter(s for s in samples if s >= 1000)
        assert max(long.values()) == 1
        if mode == "min_size":  # one of the workers may end it while the other still has a batch of the short one
            assert len(short) >= 16 and max(short.values()) == 1
        else:
            assert len(long) == 80 and len(short) == 24
        if mode == "max_size":
            assert max(short.values()) == 1
        if mode == "max_size_cycle":
            assert max(short.values()) > 1


class Fetching(Watched):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


def fetching(rank: int, size: int) -> Any:
    module = Fetching((0.002, 0.01))
    trainer = make_trainer(size, strategy(), max_epochs=2)
    trainer.fit(module, LOADERS["shuffled"](), DataLoader(regression_data(8), batch_size=4))
    return len(module.trained), trainer.current_epoch, "val_loss" in trainer.callback_metrics


def test_a_step_that_fetches_its_batches_reads_shards() -> None:
    for seen, epoch, validated in results(run_processes(fetching, 2, 2)):
        assert epoch == 2 and validated and 2 * 48 <= seen <= 2 * 52


def mixed(rank: int, size: int) -> None:
    loaders = {"map": LOADERS["shuffled"](), "stream": stream(rank)}
    make_trainer(size, strategy(), max_epochs=1).fit(Watched((0.0, 0.0)), loaders)


def test_a_loader_of_ones_own_beside_a_shared_one_is_refused() -> None:
    for outcome in run_processes(mixed, 2, 2):
        assert "Train by `max_steps`" in outcome.error


def split_by_node(rank: int, size: int) -> Any:
    import datasets
    from datasets.distributed import split_dataset_by_node

    x, y, index = DATA.tensors
    stream = datasets.Dataset.from_dict({"x": x.tolist(), "y": y.tolist(), "i": index.tolist()})
    stream = stream.to_iterable_dataset(num_shards=6).with_format("torch")

    class Split(Watched):
        def train_dataloader(self) -> Any:
            part = split_dataset_by_node(stream, self.trainer.global_rank, self.trainer.world_size)
            return DataLoader(part, batch_size=4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"], batch["i"]), batch_idx)

    module = Split((0.002, 0.01))
    make_trainer(size, strategy(), max_epochs=2).fit(module)
    return (module.trained,)


def test_an_iterable_data_set_split_by_node_is_each_workers_part() -> None:
    epochs = together(results(run_processes(split_by_node, 2, 2)))
    assert set(epochs) == {0, 1}
    for samples in epochs.values():
        assert sorted(samples) == list(range(SAMPLES))


# ---- resuming --------------------------------------------------------------------------------------------------------


class NoteAtSave(L.Callback):
    """The batches trained by this worker before its shard of each checkpoint."""

    def __init__(self) -> None:
        self.trained: list[list[tuple[int, int]]] = []

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Any) -> None:
        self.trained.append(list(pl_module.trained))


def save_and_resume(
    rank: int,
    size: int,
    folder: str,
    ckpt: str | None,
    options: dict[str, Any],
    loader: str = "shuffled",
    pauses: Sequence[float] = (0.004, 0.012, 0.008),
    every: int | None = 9,
) -> Any:
    module, plan, note = Watched(pauses), strategy(**options), NoteAtSave()
    save = ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = make_trainer(size, plan, max_epochs=2, callbacks=[save, note], enable_checkpointing=True)
    trainer.fit(module, LOADERS[loader](), ckpt_path=ckpt)
    values = nn.utils.parameters_to_vector(module.parameters()).tolist()
    return module.trained, note.trained, values, plan.summary.digest


@pytest.mark.parametrize(("loader", "workers"), [("shuffled", 2), ("shuffled", 3), ("in processes", 2)])
def test_a_resumed_epoch_repeats_no_sample(tmp_path: Path, loader: str, workers: int) -> None:
    first = results(run_processes(save_and_resume, 2, 2, str(tmp_path), None, {}, loader))
    checkpoints = complete_checkpoints(tmp_path)
    assert len(checkpoints) >= 2
    for number, checkpoint in enumerate(checkpoints[:2]):
        before = [notes[number] for _, notes, *_ in first]
        folder = str(tmp_path / f"{number}")
        ends = results(run_processes(save_and_resume, workers, workers, folder, str(checkpoint), {}, loader))
        epochs = together([(trained,) for trained in before] + ends)
        by_worker = [[Counter(epoch for epoch, _ in trained) for trained, *_ in e] for e in (zip(before), ends)]
        for epoch, samples in epochs.items():
            lost, twice = set(range(SAMPLES)) - set(samples), [s for s, n in Counter(samples).items() if n > 1]
            assert not lost and not twice, (checkpoint.name, epoch, lost, twice, by_worker)
        assert set(epochs) == {0, 1}


@pytest.mark.parametrize("pauses", [(0.004, 0.02), (0.02, 0.004)])
def test_a_checkpoint_at_the_end_of_an_epoch_repeats_no_sample(tmp_path: Path, pauses: tuple[float, float]) -> None:
    first = results(run_processes(save_and_resume, 2, 2, str(tmp_path), None, {}, "shuffled", pauses, None))
    checkpoint = next(path for path in complete_checkpoints(tmp_path) if path.name.startswith("epoch=0"))
    before = [(notes[0],) for _, notes, *_ in first]
    ends = results(
        run_processes(save_and_resume, 2, 2, f"{tmp_path}/again", str(checkpoint), {}, "shuffled", pauses, None)
    )
    epochs = together([*before, *ends])
    assert set(epochs) == {0, 1}
    for samples in epochs.values():
        assert sorted(samples) == list(range(SAMPLES))


def test_in_lockstep_a_resumed_epoch_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    lockstep = {"quorum": 2, "pace": "fixed", "overlap": False, "grace_period": 0.0}
    first = results(run_processes(save_and_resume, 2, 2, str(tmp_path), None, lockstep))
    for name in ("epoch=0-step=9.ckpt", "epoch=1-step=18.ckpt"):
        again = results(run_processes(save_and_resume, 2, 2, str(tmp_path / "again"), str(tmp_path / name), lockstep))
        for (trained, _, values, digest), (after, _, resumed, again_digest) in zip(first, again, strict=True):
            assert resumed == values and again_digest == digest
            assert trained[-len(after) :] == after and len(after) < len(trained)


def other_order(rank: int, size: int) -> None:
    data = DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, generator=torch.Generator().manual_seed(rank)))
    data = DataLoader(DATA, batch_size=4, sampler=list(data.sampler))
    make_trainer(size, strategy(), max_epochs=1).fit(Watched((0.002, 0.002)), data)


def test_workers_with_another_order_are_told() -> None:
    outcomes = run_processes(other_order, 2, 2)
    assert any("in another order on this worker" in outcome.error for outcome in outcomes)
    assert all(outcome.exitcode != 0 for outcome in outcomes)


# ---- a step that raised ----------------------------------------------------------------------------------------------


class RaisesOnce(Watched):
    """The step of a batch raises, before it has trained."""

    def __init__(self, batch: int | None) -> None:
        super().__init__([0.0])
        self.batch = batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == self.batch:
            raise ArithmeticError(batch[2].tolist())
        return super().training_step(batch, batch_idx)


def raising(rank: int, folder: str, batch: int) -> Any:
    data = DataLoader(regression_data(32), batch_size=2, shuffle=True)
    save = ModelCheckpoint(dirpath=folder, save_on_exception=True)
    plan: dict[str, Any] = {"local_steps": 1, "timeout": timedelta(seconds=30)}
    first, second = RaisesOnce(batch), RaisesOnce(None)
    trainer = make_trainer(1, AsyncLocalSGDStrategy(**plan), max_epochs=1, callbacks=[save], enable_checkpointing=True)
    with pytest.raises(ArithmeticError) as raised:
        trainer.fit(first, data)
    saved = next(Path(folder).glob("*.ckpt"))
    make_trainer(1, AsyncLocalSGDStrategy(**plan), max_epochs=1).fit(second, data, ckpt_path=str(saved))
    return first.trained, second.trained, raised.value.args[0]


@pytest.mark.parametrize("batch", [5, 15])  # 15: the last one, when nothing more can be fetched
def test_a_batch_whose_step_raised_is_trained_when_the_run_goes_on(tmp_path: Path, batch: int) -> None:
    [(before, after, raised)] = results(run_processes(raising, 1, str(tmp_path), batch))
    assert len(before) == 2 * batch and set(raised) <= {i for _, i in after}
    assert Counter(before + after) == Counter((0, i) for i in range(32))


def other_sizes(rank: int, size: int) -> None:
    data = DataLoader(DATA, batch_size=4 + 2 * rank)
    make_trainer(size, strategy(), max_epochs=1).fit(Watched((0.002, 0.002)), data)


def test_workers_with_another_batch_size_are_told() -> None:
    outcomes = run_processes(other_sizes, 2, 2)
    assert any("batches of another size" in outcome.error for outcome in outcomes)
    assert all(outcome.exitcode != 0 for outcome in outcomes)


# ---- batches of graphs, and what is left after a run ----------------------------------------------------------------


class Atoms(Dataset[dict[str, Tensor]]):
    """Molecules of 1, 2, 3 or 4 atoms."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"atoms": torch.ones(index % 4 + 1, FEATURES), "energy": torch.ones(1)}


def join(molecules: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([molecule[name] for molecule in molecules]) for name in ("atoms", "energy")}


class Copied(Regression):
    """Trains on molecules, and has its trainer copied meanwhile."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["atoms"]).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 2:
            pickle.dumps(self.trainer)
            copy.deepcopy(self.trainer.callbacks)


def graphs(rank: int, size: int) -> Any:
    record = Record()
    bar = TQDMProgressBar()
    trainer = make_trainer(size, strategy(), max_epochs=1, callbacks=[record, bar], enable_progress_bar=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Copied(), DataLoader(Atoms(), batch_size=4, collate_fn=join))
    texts = [str(warning.message) for warning in caught]
    for thread in threading.enumerate():
        if thread.name.startswith("async-localsgd-lease"):
            thread.join(10)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("async-localsgd-lease")]
    copied = pickle.loads(pickle.dumps(trainer))
    return {
        "samples": sum(update.samples for update in record.updates),
        "inferred": sum("infer the `batch_size`" in text for text in texts),
        "few workers": sum("does not have many workers" in text for text in texts),
        "threads": left,
        "loader": type(copied.train_dataloader),
        "copied samples": len(copied.train_dataloader.dataset),
    }


def test_graphs_are_counted_and_a_run_leaves_no_thread_and_a_trainer_that_can_be_copied() -> None:
    for rank, end in enumerate(results(run_processes(graphs, 2, 2))):
        assert end["samples"] == 40 and end["inferred"] == 0
        assert end["threads"] == []
        assert end["loader"] is DataLoader and end["copied samples"] == 40
        if rank == 0 and suggested_max_num_workers(2) > 1:  # else Lightning has nothing to advise
            assert end["few workers"] >= 1

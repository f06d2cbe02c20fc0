"""Workers walk shards at their own pace; leases give each unit to one worker, once, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed import HashStore, Store

from lightning_async_localsgd.data.division import Pass, Shards, merge_positions
from lightning_async_localsgd.data.leases import Leases
from lightning_async_localsgd.data.tickets import SharedTickets, StridedTickets


def test_a_round_reads_its_own_shard_and_goes_on_where_it_left() -> None:
    shard = 1
    shards = Shards(0, 3, lambda: shard)
    units = shards.units((0, 0), 12)
    assert [next(units), next(units)] == [1, 4]
    shard = 2
    assert next(units) == 2
    shard = 1
    assert next(units) == 7
    assert shards.length(12) == 4
    assert list(units) == []


def test_workers_on_their_own_shards_cover_the_data_once() -> None:
    seen = []
    for worker in range(4):
        seen += list(Shards(worker, 4, lambda worker=worker: worker).units((0, 0), 20))
    assert sorted(seen) == list(range(20))


def test_workers_on_one_shard_start_apart() -> None:
    starts = [next(Shards(w, 4, lambda: 0).units((0, 0), 40)) for w in range(4)]
    assert len(set(starts)) == 4


def test_fewer_units_than_workers_still_give_one_each() -> None:
    assert list(Shards(3, 4, lambda: 3).units((0, 0), 2)) == [0]


def test_a_shard_reader_goes_on_after_what_was_trained() -> None:
    shards = Shards(1, 2, lambda: 1)
    units = shards.units((3, 0), 40)
    drawn = [next(units) for _ in range(6)]
    for unit in drawn[:4]:
        shards.trained((3, 0), unit)
    resumed = Shards(1, 2, lambda: 1)
    resumed.load_state_dict(shards.state_dict())
    assert list(resumed.units((3, 0), 40))[:2] == drawn[4:]
    assert len(list(resumed.units((3, 0), 40))) == 20 - 4
    assert len(list(resumed.units((4, 0), 40))) == 20


class Job:
    """Workers of one process that lease from one store, each at its own speed."""

    def __init__(self, workers: int, store: Store | None = None) -> None:
        store = store if store is not None else HashStore()
        self.workers = [Leases(SharedTickets(store, w, lambda: 1 / workers), w, workers, store) for w in range(workers)]
        self.iterators: list[Iterator[int]] = []

    def begin(self, name: Pass, total: int) -> None:
        self.iterators = [worker.units(name, total) for worker in self.workers]

    def train(self, name: Pass, order: Any, most: int) -> list[tuple[int, int]]:
        """Train up to ``most`` units, on the workers in ``order``; returns worker and unit of each."""
        trained = []
        for worker in order:
            unit = next(self.iterators[worker], None)
            if unit is not None:
                self.workers[worker].trained(name, unit)
                trained.append((worker, unit))
            if len(trained) == most:
                break
        return trained

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@pytest.mark.parametrize("seed", range(5))
def test_each_unit_is_leased_once_whatever_the_speeds(seed: int) -> None:
    randomness = random.Random(seed)
    job = Job(3)
    for epoch, total in enumerate((100, 7, 2)):
        name = (epoch, 0)
        job.begin(name, total)
        speeds = [randomness.random() + 0.01 for _ in range(3)]
        trained = job.train(name, randomness.choices(range(3), speeds, k=100 * total), total)
        assert sorted(unit for _, unit in trained) == list(range(total))
        assert all(next(iterator, None) is None for iterator in job.iterators)
        assert len({worker for worker, _ in trained}) == min(3, total)  # nobody finds the epoch over
    job.close()


def test_leases_shrink_so_that_a_slow_worker_holds_few_at_the_end() -> None:
    job = Job(2)
    job.begin((0, 0), 1000)
    trained = job.train((0, 0), [*[0] * 19, 1] * 1000, 10_000)
    last_of_the_fast = max(i for i, (worker, _) in enumerate(trained) if worker == 0)
    assert len(trained) == 1000
    assert len(trained) - 1 - last_of_the_fast <= 64 + 32  # the two leases that the slow one had taken by then
    job.close()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("workers", [2, 3])
def test_a_resumed_epoch_leaves_out_what_any_worker_has_trained(seed: int, workers: int) -> None:
    randomness = random.Random(seed)
    name, total = (4, 0), 60
    job = Job(2)
    job.begin(name, total)
    before = job.train(name, randomness.choices(range(2), (3, 1), k=1000), randomness.randrange(total))
    states = [worker.state_dict() for worker in job.workers]
    job.train(name, randomness.choices(range(2), k=20), 5)  # what comes after the checkpoint is lost
    job.close()
    again = Job(workers)
    for rank, worker in enumerate(again.workers):
        worker.load_state_dict(merge_positions(states, rank if workers == 2 else 0))
    again.begin(name, total)
    after = again.train(name, randomness.choices(range(workers), k=1000), total)
    assert sorted(unit for _, unit in before + after) == list(range(total))
    again.begin((5, 0), total)
    assert len(again.train((5, 0), randomness.choices(range(workers), k=1000), total)) == total
    assert merge_positions([worker.state_dict() for worker in again.workers], 0)["trained"][5].all()
    again.close()


def test_what_was_drawn_in_vain_comes_again() -> None:
    job = Job(1)
    leases = job.workers[0]
    units = leases.units((0, 0), 10)
    drawn = [next(units) for _ in range(4)]
    leases.trained((0, 0), drawn[0])
    once_more = leases.units((0, 0), 10)
    assert next(once_more) == drawn[1]
    assert list(leases.units((0, 0), 10)) == drawn[1:] + list(range(4, 10))
    job.close()


def test_lockstep_gives_the_same_units_in_every_run() -> None:
    store = HashStore()
    workers = [Leases(StridedTickets(w, 2), w, 2, store) for w in range(2)]
    assert [list(w.units((0, 0), 5)) for w in workers] == [[0, 2, 4], [1, 3]]
    for worker, unit in ((0, 0), (0, 2), (1, 1)):
        workers[worker].trained((0, 0), unit)
    states = [w.state_dict() for w in workers]
    resumed = [Leases(StridedTickets(w, 2), w, 2, store) for w in range(2)]
    for rank, worker in enumerate(resumed):
        worker.load_state_dict(merge_positions(states, rank))
    assert [list(w.units((0, 0), 5)) for w in resumed] == [[4], [3]]


def test_devices_of_a_worker_share_its_leases() -> None:
    store = HashStore()
    devices = [Leases(SharedTickets(store, 0, lambda: 1.0, d, 2), 0, 1, store) for d in range(2)]
    assert list(devices[0].units((0, 0), 20)) == list(devices[1].units((0, 0), 20)) == list(range(20))
    for device in devices:
        device.close()


def test_further_passes_within_an_epoch_are_a_workers_own() -> None:
    job = Job(3)
    for earlier in (1, 2):
        job.begin((0, earlier), 7)
        assert [sorted(units) for units in job.iterators] == [list(range(7))] * 3
    assert len({next(worker.units((1, 1), 7)) for worker in job.workers}) == 3
    job.close()


def test_who_was_through_with_an_epoch_leaves_what_is_left_to_the_others() -> None:
    job = Job(2)
    job.begin((0, 0), 20)
    slow = next(job.iterators[1])
    for unit in job.iterators[0]:
        job.workers[0].trained((0, 0), unit)
    states = [worker.state_dict() for worker in job.workers]
    job.close()
    again = Job(2)
    for rank, worker in enumerate(again.workers):
        worker.load_state_dict(merge_positions(states, rank))
    again.begin((0, 0), 20)
    assert list(again.iterators[0]) == []
    left = list(again.iterators[1])
    assert slow in left and left == sorted(left)
    again.close()


def test_a_worker_that_saves_in_the_next_epoch_still_tells_what_it_has_trained_in_the_one_before() -> None:
    # Worker 0 saves in epoch 0 and goes on to the next one before worker 1, between two epochs, hears of it.
    job = Job(2)
    job.begin((0, 0), 20)
    theirs = job.train((0, 0), [1] * 2, 20)
    ours = job.train((0, 0), [0] * 4, 20)
    saved = job.workers[0].state_dict()
    job.train((0, 0), [0, 1] * 20, 20)
    job.begin((1, 0), 20)
    job.train((1, 0), [0, 1], 20)
    merged = merge_positions([saved, job.workers[1].state_dict()], 0)["trained"][0]
    assert {unit for _, unit in theirs + ours} <= set(merged.nonzero().flatten().tolist())
    job.close()


def test_another_order_is_refused() -> None:
    job = Job(2)
    job.workers[0].check_order((0, 0), "a")
    job.workers[1].check_order((1, 0), "a")
    with pytest.raises(ValueError, match="same seed everywhere"):
        job.workers[1].check_order((0, 0), "b")
    job.close()


def test_the_store_does_not_fill_up() -> None:
    store = HashStore()
    job = Job(2, store)
    for epoch in range(6):
        for worker in job.workers:
            worker.check_order((epoch, 0), "same")
        job.begin((epoch, 0), 10)
        job.train((epoch, 0), [0, 1] * 20, 10)
        if epoch == 2:
            keys = store.num_keys()
    assert store.num_keys() == keys
    assert len(job.workers[0].state_dict()["trained"]) <= 3
    job.close()

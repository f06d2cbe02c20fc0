"""Shards are drawn by Eq. 2, and a worker sees what its shards hold."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import SequentialSampler

from lightning_async_localsgd.data import ShardSampler, draw_shard, shard_probabilities


def test_probabilities_are_equation_2() -> None:
    assert shard_probabilities([10, 30], [0, 0]) == [0.25, 0.75]
    # shares 1/4 each; learned 1/2, 1/4, 1/4, 0: only the last lags, by 1/4
    assert shard_probabilities([5, 5, 5, 5], [2, 1, 1, 0]) == pytest.approx([0, 0, 0, 1])
    assert shard_probabilities([6, 3, 1], [40, 40, 20]) == pytest.approx([1, 0, 0])
    assert shard_probabilities([1, 1], [3, 3]) == [0.5, 0.5]


def test_draws_keep_shards_level() -> None:
    samples, generator = [0, 0, 0], torch.Generator().manual_seed(0)
    for _ in range(300):
        samples[draw_shard([1, 1, 1], samples, generator)] += 10
    assert max(samples) - min(samples) <= 20


def test_a_round_reads_its_own_shard_and_goes_on_where_it_left() -> None:
    shard = 1
    sampler = ShardSampler(SequentialSampler(range(12)), shards=3, worker=0, current_shard=lambda: shard)
    indices = iter(sampler)
    assert [next(indices), next(indices)] == [1, 4]
    shard = 2
    assert next(indices) == 2
    shard = 1
    assert next(indices) == 7
    assert len(sampler) == 4
    assert list(indices) == []


def test_workers_on_their_own_shards_cover_the_data_once() -> None:
    seen = []
    for worker in range(4):
        seen += list(ShardSampler(SequentialSampler(range(20)), 4, worker, lambda worker=worker: worker))
    assert sorted(seen) == list(range(20))


def test_workers_on_one_shard_start_apart() -> None:
    starts = [next(iter(ShardSampler(SequentialSampler(range(40)), 4, w, lambda: 0))) for w in range(4)]
    assert len(set(starts)) == 4


def test_fewer_samples_than_workers_still_give_one_each() -> None:
    assert list(ShardSampler(SequentialSampler(range(2)), 4, 3, lambda: 3)) == [0]

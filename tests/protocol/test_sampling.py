"""Shards are drawn by Eq. 2."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_async_localsgd.protocol.sampling import draw_shard, shard_probabilities


def test_probabilities_are_equation_2() -> None:
    assert shard_probabilities([10, 30], [0, 0]) == [0.25, 0.75]
    # shares 1/4 each; learned 1/2, 1/4, 1/4, 0: only the last lags, by 1/4
    assert shard_probabilities([5, 5, 5, 5], [2, 1, 1, 0]) == pytest.approx([0, 0, 0, 1])
    assert shard_probabilities([6, 3, 1], [40, 40, 20]) == pytest.approx([1, 0, 0])
    assert shard_probabilities([1, 1], [3, 3]) == [0.5, 0.5]


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 1000)), min_size=1, max_size=6))
def test_no_shard_is_drawn_that_is_ahead_of_its_share(shards: list[tuple[int, int]]) -> None:
    sizes, samples = zip(*shards, strict=True)
    probabilities = shard_probabilities(sizes, samples)
    assert sum(probabilities) == pytest.approx(1) and min(probabilities) >= 0
    ahead = [n * sum(sizes) > size * sum(samples) for size, n in shards]
    if any(ahead):
        assert [p for p, is_ahead in zip(probabilities, ahead, strict=True) if is_ahead] == [0.0] * sum(ahead)


def test_draws_keep_shards_level() -> None:
    samples, generator = [0, 0, 0], torch.Generator().manual_seed(0)
    for _ in range(300):
        samples[draw_shard([1, 1, 1], samples, generator)] += 10
    assert max(samples) - min(samples) <= 20


def test_equal_generators_draw_equal_shards() -> None:
    draws = [
        [draw_shard([1, 2, 3], [0, 0, 0], generator) for _ in range(50)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    ]
    assert draws[0] == draws[1] != draws[2]
    assert set(draws[0]) == {0, 1, 2}

"""Shard sampling: workers draw data shards by how far each has been learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["ShardSampler", "draw_shard", "shard_probabilities"]


def shard_probabilities(sizes: Sequence[int], samples: Sequence[int]) -> list[float]:
    """Probability of each shard: ``p_i ∝ max(|D_i| / Σ|D_j| - n_i / Σ n_j, 0)``.

    Where every shard is exactly as far as its size asks for (also before the first sample), shards are drawn by size.

    Args:
        sizes: samples in each shard, |D_i|.
        samples: samples learned so far from each shard, n_i.

    References:
        Liu et al. 2024 (arXiv 2401.09135), Eq. 2.
    """
    size, learned = sum(sizes), sum(samples)
    shares = [d / size for d in sizes]
    if learned == 0:
        return shares
    lag = [max(share - n / learned, 0.0) for share, n in zip(shares, samples, strict=True)]
    total = sum(lag)
    return [x / total for x in lag] if total > 0 else shares


def draw_shard(sizes: Sequence[int], samples: Sequence[int], generator: torch.Generator) -> int:
    """Draw the shard that a worker trains on in its next round."""
    probabilities = torch.tensor(shard_probabilities(sizes, samples), dtype=torch.float64)
    return int(torch.multinomial(probabilities, 1, generator=generator))


class ShardSampler(Sampler[int]):
    """Yields the samples of whichever shard the worker's round has drawn.

    Shard ``s`` of ``k`` is every k-th sample of ``source``'s order, from the s-th on. Worker ``w`` enters each shard at
    w/k of its length and goes on from where it left it, so that workers who walk the same order at different speeds
    seldom meet the same sample in the same pass. One pass has as many samples as a shard.

    Args:
        source: the order of one epoch over the whole data set; with ``set_epoch`` where it has one. It must give the
            same order on every worker.
        shards: k, the number of shards (one per worker).
        worker: the rank of this worker.
        current_shard: tells the shard that the worker's current round has drawn.
    """

    def __init__(self, source: Sampler[int], shards: int, worker: int, current_shard: Callable[[], int]) -> None:
        self.source = source
        self.shards = shards
        self.worker = worker
        self.current_shard = current_shard

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to ``source``, which shuffles by it."""
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.source) // self.shards)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        order = list(self.source)
        shards = [order[s :: self.shards] for s in range(self.shards)]
        cursors = [len(shard) * self.worker // self.shards for shard in shards]
        for _ in range(len(self)):
            # A data set smaller than the number of workers leaves shards empty: their samples come from shard 0.
            s = self.current_shard() if shards[self.current_shard()] else 0
            yield shards[s][cursors[s] % len(shards[s])]
            cursors[s] += 1

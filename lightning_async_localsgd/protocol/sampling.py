"""The data shard of a worker's next round, drawn by progress (Eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = [
    "draw_shard",
    "shard_probabilities",
]


def shard_probabilities(sizes: Sequence[int], samples: Sequence[int]) -> list[float]:
    """Probability of each shard: ``p_i ∝ max(|D_i| / Σ|D_j| - n_i / Σ n_j, 0)``.

    If the progress of all shards is exactly in proportion to their sizes (as before the first sample), shards are drawn
    by size.

    Args:
        sizes: number of samples in each shard, |D_i|.
        samples: number of samples learned so far from each shard, n_i.

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
    """Draw the shard of a worker's next round."""
    probabilities = torch.tensor(shard_probabilities(sizes, samples), dtype=torch.float64)
    return int(torch.multinomial(probabilities, 1, generator=generator))

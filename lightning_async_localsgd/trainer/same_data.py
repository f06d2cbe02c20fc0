"""Early detection of workers that train on the same data because it was not divided among them."""

from __future__ import annotations

import warnings
import zlib
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_async_localsgd.data.loader import WorkerLoader
from lightning_async_localsgd.internals import training_loaders
from lightning_async_localsgd.membership import JobStore
from lightning_async_localsgd.trainer.fit import Fit

__all__ = ["SameData"]

_BATCHES = 3  # number of batches to compare
_BYTES = 1 << 16  # of each tensor


class SameData:
    """Compares the first batches of this process with those of all others, through the job's store.

    The second process with the same batches in the same order warns. Batches equal to each other prove nothing.

    Args:
        store: a part of the job's store, this comparison's own, for the thread that trains.
        rank: rank of this process.
    """

    def __init__(self, store: JobStore, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._checksums: list[int] = []

    @classmethod
    def where_possible(cls, fit: Fit, trainer: pl.Trainer) -> SameData | None:
        """The comparison of a ``fit``; None where batches are shared out, or the same ones are meant."""
        loaders = training_loaders(trainer)
        shared_out = loaders is not None and all(isinstance(loader, WorkerLoader) for loader in loaders.flattened)
        meant = fit.same_data or trainer.overfit_batches > 0  # type: ignore[attr-defined]
        if shared_out or meant or fit.place.world_size == 1:
            return None
        return cls(fit.job.calls.within("first_batches"), fit.place.global_rank)

    def see(self, batch: Any) -> None:
        """Record a trained batch."""
        if len(self._checksums) == _BATCHES:
            return
        self._checksums.append(_checksum(batch))
        if len(self._checksums) == _BATCHES and len(set(self._checksums)) == _BATCHES:
            self._compare()

    def _compare(self) -> None:
        name = "/".join(map(str, self._checksums))
        first = int(self._store.compare_set(name, "", str(self._rank)))
        if first != self._rank:
            warnings.warn(
                f"Processes {first} and {self._rank} train on the same batches in the same order: the training data is "
                "not divided among them. Divide it by `trainer.global_rank` and `trainer.world_size` where it is made "
                "or read, for instance with `datasets.distributed.split_dataset_by_node`; or give a map-style data set "
                "to a plain `DataLoader`, whose batches are shared out. If that is meant, pass "
                "`AsyncLocalSGDStrategy(same_data=True)`.",
                stacklevel=2,
            )


def _checksum(batch: Any) -> int:
    checksum = 0
    for leaf in tree_leaves(batch):
        for part in tree_leaves(vars(leaf)) if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor) else [leaf]:
            checksum = zlib.crc32(_bytes(part), checksum)
    return checksum


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_quantized:
        some = leaf.detach().flatten()[: _BYTES // max(1, leaf.element_size())]
        return some.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
        return leaf.tobytes()[:_BYTES]
    return repr(leaf).encode() if isinstance(leaf, (str, bytes, int, float)) else b""

"""The training data of virtual workers: each reads its own part, in the order of a real run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import count
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_async_localsgd.data.division import Shards
from lightning_async_localsgd.data.loader import Orders, WorkerLoader
from lightning_async_localsgd.internals import get_distributed_sampler, is_dataloader_shuffled, update_dataloader
from lightning_async_localsgd.simulation.steps import Passes

__all__ = ["VirtualLoaders"]

_PASSES_KEPT = 8  # fast workers are several passes ahead of slow ones


class VirtualLoaders:
    """Divides the batches among the virtual workers.

    Map-style loaders are divided as :class:`~lightning_async_localsgd.AsyncLocalSGDStrategy` divides them under
    ``max_steps``: each round reads from the shard that it has drawn. All loading takes place in this process.

    Args:
        data: a map-style ``DataLoader``, several in a collection or a ``CombinedLoader``; or a function of rank and
            size that returns one worker's data, an iterable that is iterated pass after pass.
        workers: number of workers.
        seed: seed of the order of the samples.

    Raises:
        ValueError: if the data cannot be divided.
    """

    def __init__(self, data: Any, workers: int, seed: int) -> None:
        self._data = data
        self._workers = workers
        self._seed = seed
        self._own = callable(data) and not isinstance(data, (DataLoader, CombinedLoader))
        if not self._own:
            self._combined = data if isinstance(data, CombinedLoader) else CombinedLoader(data, "max_size_cycle")
            self._orders = [Orders(_PASSES_KEPT) for _ in self._combined.flattened]
            for loader in self._combined.flattened:
                _check(loader)

    def passes(self, worker: int, current_shard: Callable[[], int]) -> Passes:
        """A worker's data.

        Args:
            worker: rank of the worker.
            current_shard: returns the shard that the worker's current round has drawn.

        Raises:
            ValueError: from the batches, if a pass has none.
        """
        loaders: list[WorkerLoader] = []
        source: Any
        if self._own:
            source = self._data(worker, self._workers)
        else:
            loaders = [
                self._divide(loader, worker, current_shard, orders)
                for loader, orders in zip(self._combined.flattened, self._orders, strict=True)
            ]
            source = copy(self._combined)
            source.flattened = loaders
        length = sized_len(source if self._own else iter(source))
        return Passes(self._batches(worker, source, loaders), math.inf if length is None else length)

    def _batches(self, worker: int, source: Any, loaders: Sequence[WorkerLoader]) -> Iterator[tuple[Any, int]]:
        for number in count():
            for loader in loaders:
                loader.sampler.set_epoch(number)
            index = -1
            for index, batch in enumerate(source):
                yield (batch if self._own else batch[0]), index
            if index < 0:
                raise ValueError(
                    f"The training data of worker {worker} has no batch: use more data or smaller batches."
                )

    def _divide(
        self, loader: DataLoader[Any], worker: int, current_shard: Callable[[], int], orders: Orders
    ) -> WorkerLoader:
        sampler = get_distributed_sampler(
            loader,
            shuffle=is_dataloader_shuffled(loader),
            overfit_batches=0,
            mode=RunningStage.TRAINING,
            num_replicas=1,
            rank=0,
            seed=self._seed,
        )
        own = update_dataloader(loader, sampler, mode=RunningStage.TRAINING)
        vars(own).update(num_workers=0, timeout=0, prefetch_factor=None, persistent_workers=False)
        return WorkerLoader(
            own, Shards(worker, self._workers, current_shard), self._seed, fetches=lambda: (0, 0), orders=orders
        )


def _check(loader: object) -> None:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
        raise ValueError(
            f"{kind} cannot be divided among virtual workers. Pass a function of rank and size that gives each worker "
            "its own part, for instance `lambda rank, size: DataLoader(split_dataset_by_node(data, rank, size))`."
        )
    if isinstance(loader.sampler, DistributedSampler):
        raise ValueError(
            "The training loader has a `DistributedSampler`, which knows this process only. Leave it out, or pass a "
            "function of rank and size that gives each virtual worker a loader of its own."
        )

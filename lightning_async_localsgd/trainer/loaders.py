"""The training loaders of one worker: a division of the batches for each of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.pytorch.trainer.connectors.data_connector import _worker_check
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.distributed import PrefixStore, Store
from torch.utils.data import DataLoader

from lightning_async_localsgd.data.division import Division, Shards
from lightning_async_localsgd.data.leases import Leases
from lightning_async_localsgd.data.loader import WorkerLoader, count_samples
from lightning_async_localsgd.data.tickets import SharedTickets, StridedTickets, Tickets

if TYPE_CHECKING:
    from lightning_async_localsgd.trainer.strategy import AsyncLocalSGDStrategy


__all__ = [
    "TrainingLoaders",
    "fetched_ahead",
    "samples_in_training",
]


class TrainingLoaders:
    """Gives each training loader of a ``fit`` the division of its batches; the same one if it is set up again.

    Args:
        strategy: whose workers.
    """

    def __init__(self, strategy: AsyncLocalSGDStrategy) -> None:
        self._strategy = strategy
        self._divisions: list[Division] = []  # by place: the first loader, the second one, ...
        self._before: object = None  # the loaders before those that are being set up
        self._place = 0

    def divide(self, loader: DataLoader[Any], seed: int, trainer: pl.Trainer, store: Store) -> WorkerLoader:
        """This worker's part of a map-style loader.

        Args:
            loader: the loader, which must not be used otherwise.
            seed: seed of the order of its samples.
            trainer: whose loader.
            store: the job's store in this ``fit``.

        Raises:
            MisconfigurationException: if its batches come in an order that nobody knows.
        """
        if loader.num_workers > 0 and not getattr(loader, "in_order", True):
            raise MisconfigurationException(
                "With `DataLoader(in_order=False)` nobody knows which batches were trained. Leave it at True; or pass "
                "`Trainer(use_distributed_sampler=False)` and divide the data by `trainer.global_rank` yourself."
            )
        _worker_check(trainer, loader, "train_dataloader")  # Lightning takes what comes of it for no `DataLoader`
        _auto_add_worker_init_fn(loader, trainer.global_rank)
        loaders = trainer.fit_loop._combined_loader  # while they are being set up, those before
        if loaders is not self._before:
            self._before, self._place = loaders, 0
        if self._place == len(self._divisions):
            self._divisions.append(self._make_division(trainer, PrefixStore(f"loader{self._place}", store)))
        division = self._divisions[self._place]
        self._place += 1
        strategy = self._strategy
        fetches = partial(_fetches, trainer)
        return WorkerLoader(
            loader,
            division,
            seed,
            fetches,
            strategy.device_rank,
            strategy.worker_size,
            for_training=lambda: strategy.reads_training_data,
            place=(strategy.global_rank, strategy.world_size),
        )

    def _make_division(self, trainer: pl.Trainer, store: Store) -> Division:
        """By leases where epochs are counted, else by Eq. 2."""
        strategy, worker, workers = self._strategy, self._strategy.worker_rank, self._strategy.workers
        # A step that fetches its batches itself would learn too late that there is no more.
        fetches = is_param_in_hook_signature(trainer.lightning_module.training_step, "dataloader_iter", explicit=True)
        if trainer.max_epochs in (None, -1) or fetches:
            return Shards(worker, workers, lambda: strategy.worker.shard if strategy.worker is not None else worker)
        if strategy.settings.lockstep(workers):
            tickets: Tickets = StridedTickets(worker, workers)
        else:
            tickets = SharedTickets(
                store,
                worker,
                lambda: strategy.worker.share if strategy.worker is not None else 1 / workers,
                strategy.device_rank,
                strategy.worker_size,
                strategy.settings.timeout,
            )
        return Leases(tickets, worker, workers, store, strategy.settings.timeout, self._local_steps)

    def _local_steps(self) -> int:
        return self._strategy.worker.local_steps if self._strategy.worker is not None else 0

    def __getstate__(self) -> dict[str, Any]:
        """Divisions do not leave their process."""
        return vars(self) | {"_divisions": [], "_before": None, "_place": 0}

    def close(self) -> None:
        """The ``fit`` is over."""
        for division in self._divisions:
            division.close()
        self._divisions, self._before, self._place = [], None, 0


def fetched_ahead(trainer: pl.Trainer) -> int:
    """Batches that Lightning's loop holds and has not trained yet; also one whose step is under way, or has raised."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return len(getattr(trainer.fit_loop._data_fetcher, "batches", ())) + (progress.ready > progress.processed)


def _fetches(trainer: pl.Trainer) -> tuple[int, int]:
    """Batches that Lightning's loop has fetched in this epoch, and those of them that it has not trained yet."""
    return getattr(trainer.fit_loop._data_fetcher, "fetched", 0), fetched_ahead(trainer)


def samples_in_training(trainer: pl.Trainer, batch: Any) -> int:
    """Samples of the batch that has just been trained.

    A loader's sampler knows best: in a batch of graphs, the first tensor has an entry for each node.
    """
    loaders = trainer.fit_loop._combined_loader
    if loaders is not None and len(loaders.flattened) == 1 and isinstance(loaders.flattened[0], WorkerLoader):
        samples = loaders.flattened[0].samples
        if samples is not None:
            return samples
    return count_samples(batch)

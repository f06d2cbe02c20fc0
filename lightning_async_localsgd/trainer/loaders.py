"""The training loaders of one worker: a division of the batches for each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.distributed import PrefixStore, Store
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_async_localsgd.data.division import Division, Shards
from lightning_async_localsgd.data.leases import Leases
from lightning_async_localsgd.data.loader import WorkerLoader
from lightning_async_localsgd.data.tickets import SharedTickets, StridedTickets, Tickets
from lightning_async_localsgd.internals import auto_add_worker_init_fn, check_loader_workers, training_loaders
from lightning_async_localsgd.trainer.fetches import fetched
from lightning_async_localsgd.trainer.fit import Fit

__all__ = ["TrainingLoaders"]


class TrainingLoaders:
    """The divisions of the training loaders of a ``fit``; a loader that is set up again keeps its division.

    Args:
        fit: the ``fit``.
        reading: tells whether the training loop reads. Other code reads a process's part of the data.
    """

    def __init__(self, fit: Fit, reading: Callable[[], bool]) -> None:
        self._fit = fit
        self._reading = reading
        self._divisions: list[Division] = []  # in the order of the loaders
        self._before: object = None  # the previous loaders, while new ones are set up
        self._place = 0

    def process(self, loader: object) -> object:
        """This worker's part of a loader, if it is a map-style one for training whose data nobody else divides.

        Raises:
            MisconfigurationException: if its batches come in an order that nobody knows.
        """
        trainer = self._fit.trainer
        overfitting = trainer.overfit_batches > 0  # type: ignore[attr-defined]
        if not isinstance(loader, DataLoader) or not trainer.training or overfitting:
            return loader
        # With a batch sampler of the user's own, that is where Lightning puts the sampler.
        sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
        # Lightning has just put a sampler over all of the data under a copy of it, unless the user asked for their own.
        if not isinstance(sampler, DistributedSampler) or sampler.num_replicas != 1:
            return loader
        return self._divide(loader, sampler.seed)

    def _divide(self, loader: DataLoader[Any], seed: int) -> WorkerLoader:
        """This worker's part of a map-style loader.

        Args:
            loader: the loader; it must not be used otherwise.
            seed: seed of the order of its samples.
        """
        trainer, store = self._fit.trainer, self._fit.job.store
        if loader.num_workers > 0 and not getattr(loader, "in_order", True):
            raise MisconfigurationException(
                "With `DataLoader(in_order=False)` nobody knows which batches were trained. Leave it at True; or pass "
                "`Trainer(use_distributed_sampler=False)` and divide the data by `trainer.global_rank` yourself."
            )
        check_loader_workers(trainer, loader, "train_dataloader")  # Lightning takes the result for no `DataLoader`
        auto_add_worker_init_fn(loader, trainer.global_rank)
        loaders = training_loaders(trainer)  # while they are being set up, those before
        if loaders is not self._before:
            self._before, self._place = loaders, 0
        if self._place == len(self._divisions):
            self._divisions.append(self._make_division(trainer, PrefixStore(f"loader{self._place}", store)))
        division = self._divisions[self._place]
        self._place += 1
        place = self._fit.place
        fetches = partial(fetched, trainer)
        return WorkerLoader(
            loader,
            division,
            seed,
            fetches,
            place.device_rank,
            place.worker_size,
            for_training=self._reading,
            place=(place.global_rank, place.world_size),
        )

    def _make_division(self, trainer: pl.Trainer, store: Store) -> Division:
        """Leases if epochs are counted, otherwise shards by Eq. 2."""
        fit, place = self._fit, self._fit.place
        # A step that fetches its batches itself would notice the end of the leases too late.
        fetches = is_param_in_hook_signature(trainer.lightning_module.training_step, "dataloader_iter", explicit=True)
        if trainer.max_epochs in (None, -1) or fetches:
            return Shards(
                place.worker_rank,
                place.workers,
                lambda: fit.worker.shard if fit.worker is not None else place.worker_rank,
            )
        if fit.settings.lockstep(place.workers):
            tickets: Tickets = StridedTickets(place.worker_rank, place.workers)
        else:
            tickets = SharedTickets(
                store,
                place.worker_rank,
                lambda: fit.worker.pace_share if fit.worker is not None else 1 / place.workers,
                place.device_rank,
                place.worker_size,
                fit.settings.timeout,
            )
        return Leases(tickets, place.worker_rank, place.workers, store, fit.settings.timeout, self._local_steps)

    def _local_steps(self) -> int:
        return self._fit.worker.local_steps if self._fit.worker is not None else 0

    def close(self) -> None:
        """Close the divisions, at the end of the ``fit``."""
        for division in self._divisions:
            division.close()
        self._divisions, self._before, self._place = [], None, 0

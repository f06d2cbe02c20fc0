"""Epochs that all workers share, in Lightning's loop; and the end of a run by the job's budget."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async_localsgd.data import Leases
from lightning_async_localsgd.fetches import Fetches, OpenEnded
from lightning_async_localsgd.loader import WorkerLoader

__all__ = ["JobEpochs", "JobMaxSteps"]


class JobMaxSteps(int):
    """``trainer.max_steps`` as the user gave it, but reached when the job's budget is spent.

    Lightning ends a loop when ``global_step >= max_steps``. A fast worker makes more steps than that and a slow one
    fewer, while schedules and progress bars that read ``trainer.max_steps`` should find the user's number. Python asks
    the operand whose class derives from the other's first, so the comparison comes here.
    """

    reached = False

    def __le__(self, other: int) -> bool:
        return self.reached


class _OpenEnd(int):
    """``trainer.num_training_batches`` as the user sees it, reached when an epoch's leases are used up.

    It is what a worker gets on average. Lightning compares its count of batches with it; so do users.
    """

    progress: Any
    """Lightning's count of batches, which knows whether this is the last one."""
    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return bool(other) and self.progress.is_last_batch

    def __le__(self, other: int) -> bool:
        return bool(self.progress.is_last_batch)


class JobEpochs:
    """Has Lightning's loop go through epochs that all workers share, where the loaders lease their batches.

    Args:
        trainer: whose loop.
        fetches: watches its fetches.
    """

    def __init__(self, trainer: pl.Trainer, fetches: Fetches) -> None:
        self._trainer = trainer
        self._fetches = fetches
        self._loop = trainer.fit_loop
        self._interval: float | None = None  # batches per worker between two validations
        self._validated_at = 0.0

    @property
    def expected_steps(self) -> int | None:
        """Steps of the job in all epochs, as schedules are planned with; None where that is not known."""
        try:
            steps = self._trainer.estimated_stepping_batches
        except MisconfigurationException:  # accumulation that changes on the way
            return None
        return int(steps) if 0 < steps < sys.maxsize and self._leased else None

    def begin_training(self) -> None:
        """Begin with the first epoch, or go on in the one of the checkpoint."""
        if not self._open_end():
            return
        if self._trainer.current_epoch == 0 or self._loop.restarting or self._loop.is_resuming:  # else it does so later
            assert self._loop._combined_loader is not None and self._loop._data_fetcher is not None
            for loader in self._loop._combined_loader.flattened:
                _set_sampler_epoch(loader, self._loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
            iter(self._loop._data_fetcher)
        self._validated_at = self._made()
        if self._interval is not None and self._loop.epoch_loop.batch_progress.is_last_batch:
            self._trainer.val_check_batch = 1  # the checkpoint may have been written before or in this validation

    def begin_epoch(self) -> None:
        """Begin with an epoch; its loaders may be new."""
        self._open_end()
        if self._trainer.check_val_every_n_epoch is not None:
            self._validated_at = 0.0

    def _open_end(self) -> bool:
        """Have an epoch end with its leases, if that is not so yet; returns whether there are leases."""
        loaders, fetcher = self._loop._combined_loader, self._loop._data_fetcher
        assert loaders is not None and fetcher is not None
        leased = self._leased
        if not leased or isinstance(fetcher._combined_loader, OpenEnded):
            return bool(leased)
        if len(leased) < len(loaders.flattened):
            raise MisconfigurationException(
                "With `max_epochs` the batches of map-style training loaders are shared out to all workers, and beside "
                "them there is a loader that is each worker's own (an iterable one, or with a sampler of yours). Train "
                "by `max_steps`, with `max_epochs=-1`; or pass `Trainer(use_distributed_sampler=False)` and divide the "
                "data by `trainer.global_rank` yourself."
            )
        fetcher.setup(OpenEnded(loaders, self._fetches))  # type: ignore[arg-type]
        if self._loop.max_batches == float("inf"):  # a batch sampler without a length
            return True
        limit = self._trainer.limit_train_batches
        for loader in leased:
            assert isinstance(loader.division, Leases)
            if isinstance(limit, int) or limit < 1.0:
                loader.division.limit = int(self._loop.max_batches) * loader.division.workers
        self._loop.max_batches = _OpenEnd(self._loop.max_batches)
        self._loop.max_batches.progress = self._loop.epoch_loop.batch_progress
        if isinstance(self._trainer.val_check_batch, int):
            self._interval = self._trainer.val_check_batch
            self._trainer.val_check_batch = sys.maxsize
        return True

    @property
    def _leased(self) -> list[WorkerLoader]:
        loaders = self._loop._combined_loader
        assert loaders is not None
        return [
            loader
            for loader in loaders.flattened
            if isinstance(loader, WorkerLoader) and isinstance(loader.division, Leases)
        ]

    @property
    def is_last(self) -> bool:
        """Whether there is no epoch after this one."""
        epochs = self._trainer.max_epochs
        return epochs not in (None, -1) and self._trainer.current_epoch + 1 >= epochs

    @property
    def at_the_end(self) -> bool:
        """Whether this was the last batch of the last epoch."""
        return self.is_last and self._loop.epoch_loop._num_ready_batches_reached()

    def schedule_validation(self) -> None:
        """Have Lightning validate now if the job has made ``val_check_interval`` of an epoch since the last time.

        This worker's own batches would tell little: of a shared epoch it may make few, or most.
        """
        if self._interval is None:
            return
        made = self._made()
        due = made // self._interval > self._validated_at // self._interval
        self._trainer.val_check_batch = 1 if due else sys.maxsize
        self._validated_at = made

    def _made(self) -> float:
        """Batches per worker that the job has made in this epoch, or in all if validation is counted across epochs."""
        of_epoch = int(self._loop.max_batches)
        if self._loop.epoch_loop.batch_progress.is_last_batch:
            in_epoch: float = of_epoch
        else:  # leases are drawn ahead: an epoch is over with the last batch
            in_epoch = min(max(loader.position for loader in self._leased) * of_epoch, of_epoch - 0.5)
        across = self._trainer.check_val_every_n_epoch is None
        return in_epoch + (of_epoch * self._trainer.current_epoch if across else 0)

"""Epochs shared by all workers in Lightning's loop, and the job's progress in them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async_localsgd.data.leases import Leases
from lightning_async_localsgd.data.loader import WorkerLoader
from lightning_async_localsgd.internals import (
    data_fetcher,
    epoch_over,
    fetched_loaders,
    set_sampler_epoch,
    training_loaders,
)
from lightning_async_localsgd.trainer.fetches import Fetches, OpenEnded
from lightning_async_localsgd.trainer.fit import Fit
from lightning_async_localsgd.trainer.fit_loops import LoopControl

__all__ = ["JobEpochs"]


class JobEpochs:
    """Makes Lightning's loop iterate over epochs shared by all workers, if the loaders lease their batches.

    It also counts the job's batches, for validation and progress bars: this worker's own, and the others' by their
    steps at the latest exchange and their pace since then.

    Args:
        fit: the ``fit``.
        trainer: its trainer.
        control: controls the trainer's loop.
    """

    def __init__(self, fit: Fit, trainer: pl.Trainer, control: LoopControl) -> None:
        self._fit = fit
        self._trainer = trainer
        self._control = control
        self._loop = trainer.fit_loop
        self._fetches: Fetches | None = None
        self._before = 0.0  # batches per worker of earlier epochs
        self._resumed = 0.0  # batches per worker of this epoch before `_own` was counted from 0
        self._made = 0.0  # batches per worker of this epoch
        self._own = 0
        self._steps_before: Sequence[int] = ()  # steps of each worker before this epoch

    @property
    def expected_steps(self) -> int | None:
        """Steps of the job in all epochs, for planning schedules; None if unknown."""
        try:
            steps = self._trainer.estimated_stepping_batches
        except MisconfigurationException:  # accumulation that changes during the run
            return None
        return int(steps) if 0 < steps < sys.maxsize and self._leased else None

    def prepare(self, fetches: Fetches) -> None:
        """Begin the first epoch, or continue the checkpoint's, before the start of the workers.

        Args:
            fetches: watches the loop's fetches.
        """
        self._fetches = fetches
        if not self._open_end():
            return
        if self._trainer.current_epoch == 0 or self._loop.restarting or self._loop.is_resuming:  # else it does so later
            loaders, fetcher = training_loaders(self._trainer), data_fetcher(self._trainer)
            assert loaders is not None and fetcher is not None
            for loader in loaders.flattened:
                set_sampler_epoch(loader, self._epoch)
            iter(fetcher)

    def begin_training(self) -> None:
        """Begin to count, after the start of the workers."""
        progress = self._loop.epoch_loop.batch_progress
        if self._control.epochs_shared:
            self._before = self._batches_of_epoch * self._trainer.current_epoch
            trained = max(loader.division.trained_before(self._epoch) for loader in self._leased)  # type: ignore[attr-defined]
            self._begin_counting(trained / self._fit.place.workers)
        else:
            made = self._fit.job_steps * self._trainer.accumulate_grad_batches
            in_epoch = made if self._trainer.current_epoch == 0 else min(made, progress.current.ready)
            self._before = made - in_epoch
            self._begin_counting(in_epoch)
        if self._counts_validation:  # the checkpoint may be older than a validation, or from a failed one
            restarted = self._loop.epoch_loop.val_loop.restarted_mid_evaluation
            self._control.validation_due = progress.is_last_batch or restarted

    def begin_epoch(self) -> None:
        """Begin an epoch; its loaders may be new."""
        self._open_end()
        self._before += self._made
        if self._control.epochs_shared:
            self._before = self._batches_of_epoch * self._trainer.current_epoch
        self._begin_counting(0.0)

    def _begin_counting(self, made: float) -> None:
        self._resumed = self._made = made
        self._own = 0
        self._steps_before = self._steps_made

    def _open_end(self) -> bool:
        """Have an epoch end with its leases, if that is not so yet; returns whether there are leases."""
        loaders, fetcher = training_loaders(self._trainer), data_fetcher(self._trainer)
        assert loaders is not None and fetcher is not None
        leased = self._leased
        if not leased or isinstance(fetched_loaders(fetcher), OpenEnded):
            return bool(leased)
        if len(leased) < len(loaders.flattened):
            raise MisconfigurationException(
                "With `max_epochs` the batches of map-style training loaders are shared out to all workers, and beside "
                "them there is a loader that is each worker's own (an iterable one, or with a sampler of yours). Train "
                "by `max_steps`, with `max_epochs=-1`; or pass `Trainer(use_distributed_sampler=False)` and divide the "
                "data by `trainer.global_rank` yourself."
            )
        assert self._fetches is not None
        fetcher.setup(OpenEnded(loaders, self._fetches))  # type: ignore[arg-type]
        if self._loop.max_batches == float("inf"):  # a batch sampler without a length
            return True
        limit = self._trainer.limit_train_batches
        for loader in leased:
            assert isinstance(loader.division, Leases)
            if isinstance(limit, int) or limit < 1.0:
                loader.division.limit = int(self._loop.max_batches) * loader.division.workers
        self._control.epochs_shared = True
        return True

    @property
    def _leased(self) -> list[WorkerLoader]:
        loaders = training_loaders(self._trainer)
        assert loaders is not None
        return [
            loader
            for loader in loaders.flattened
            if isinstance(loader, WorkerLoader) and isinstance(loader.division, Leases)
        ]

    @property
    def _epoch(self) -> int:
        return int(self._loop.epoch_progress.current.processed)  # type: ignore[attr-defined]

    @property
    def is_last(self) -> bool:
        """Whether there is no epoch after this one."""
        epochs = self._trainer.max_epochs
        return epochs not in (None, -1) and self._trainer.current_epoch + 1 >= epochs

    @property
    def at_the_end(self) -> bool:
        """Whether this was the last batch of the last epoch."""
        return self.is_last and epoch_over(self._trainer)

    # ---- what the job has made --------------------------------------------------------------------------------------

    @property
    def batches_made(self) -> int:
        """The job's batches per worker in this epoch so far."""
        return int(self._before + self._made) - int(self._before)

    @property
    def batches_left(self) -> int | float:
        """Batches per worker left of ``max_steps`` at the start of this epoch."""
        if self._trainer.max_steps == -1 or self._trainer.max_epochs != -1:
            return float("inf")
        return max(0, self._trainer.max_steps * self._trainer.accumulate_grad_batches - int(self._before))

    def count_batch(self) -> None:
        """Count a batch of this worker, after its step was counted, and decide whether validation is due.

        Validation is due when the job has made ``val_check_interval`` batches since the last one. This worker's own
        batches are no measure: it may make few or most of a shared epoch.
        """
        before = self._validation_count
        if self._own == 0:
            self._hear_who_began_before()
        self._own += 1
        made = self._resumed + (self._own + self._made_by_others()) / self._fit.place.workers
        if self._control.epochs_shared:  # an epoch ends with this worker's last batch, and not before
            last = self._loop.epoch_loop.batch_progress.is_last_batch
            made = self._batches_of_epoch if last else min(made, self._batches_of_epoch - 0.5)
        self._made = max(self._made, made)
        if self._counts_validation and self._control.validates:
            interval = self._trainer.val_check_batch
            assert interval is not None
            assert self._fit.worker is not None
            due = self._validation_count // interval > before // interval
            self._control.validation_due = self._fit.worker.agree(due)

    def validate_what_has_come_of_it(self) -> None:
        """Validate after the last batch of a run without a validation, if the job has made enough batches for one.

        In passes of its own, a slow worker 0 may end the run before any validation. Callbacks that need metrics (early
        stopping, the best checkpoint) would then fail.
        """
        interval = self._trainer.val_check_batch
        assert self._fit.worker is not None
        made = self._fit.worker.job_steps * self._trainer.accumulate_grad_batches
        if self._control.validates and self._trainer.enable_validation and interval is not None and made >= interval:
            self._control.validation_due = True

    def _hear_who_began_before(self) -> None:
        """Read the steps that workers had made when they began this epoch before this worker."""
        lockstep = self._fit.settings.lockstep(self._fit.place.workers)
        if self._control.epochs_shared and not lockstep:
            begun = self._leased[0].division.begun  # type: ignore[attr-defined]
            self._steps_before = [
                steps if epoch >= self._epoch else before
                for before, (epoch, steps) in zip(self._steps_before, begun, strict=False)
            ] or self._steps_before

    def _made_by_others(self) -> int:
        """The other workers' batches in this epoch so far."""
        steps = zip(self._steps_made, self._steps_before, strict=True)
        made = [max(0, now - before) for now, before in steps]
        del made[self._fit.place.worker_rank : self._fit.place.worker_rank + 1]
        return sum(made) * self._trainer.accumulate_grad_batches

    @property
    def _steps_made(self) -> Sequence[int]:
        return self._fit.worker.steps_made if self._fit.worker is not None else ()

    @property
    def _batches_of_epoch(self) -> int:
        return int(self._loop.max_batches)

    @property
    def _counts_validation(self) -> bool:
        """Whether validation counts the job's batches. A pass of this worker's own ends with its own batches."""
        across_passes = self._loop.max_batches == float("inf") or self._trainer.check_val_every_n_epoch is None
        by_batches = isinstance(self._trainer.val_check_batch, int)
        return by_batches and (self._control.epochs_shared or across_passes)

    @property
    def _validation_count(self) -> float:
        """Batches per worker for validation: of this epoch, or of all epochs."""
        return self._made + (self._before if self._trainer.check_val_every_n_epoch is None else 0)

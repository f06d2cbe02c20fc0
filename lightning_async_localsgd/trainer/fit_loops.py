"""Lightning's training loops, changed to count the steps of the job instead of this worker's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_async_localsgd.internals import DataFetcher, FitLoop, TrainingEpochLoop
from lightning_async_localsgd.trainer.mixing import mix_in, mix_out

__all__ = ["LoopControl", "release_loops", "take_over_loops"]


class LoopControl:
    """Controls the loops of a trainer.

    Args:
        trainer: the trainer.
        callback: the callback that controls the loops. While the trainer does not have it, as in a trial of the
            learning-rate finder, the loops behave as Lightning's own.
    """

    def __init__(self, trainer: pl.Trainer, callback: pl.Callback) -> None:
        self._trainer = trainer
        self._callback = callback
        self._max_steps = trainer.max_steps
        self.run_over = False
        """Whether the job has spent its budget, or was asked to stop."""
        self.epochs_shared = False
        """Whether an epoch ends when none of its batches is left, however many this worker has made."""
        self.validation_due: bool | None = None
        """Whether to validate after this batch; None: Lightning decides by this worker's own batches."""
        self.validates = True
        """Whether this worker validates at all."""
        self.after_validation: Callable[[], None] | None = None
        """Called after each batch, and after its validation, if any."""

    @property
    def in_charge(self) -> bool:
        """Whether the job controls the loops."""
        return self._callback in self._trainer.callbacks  # type: ignore[attr-defined]

    @property
    def limits_steps(self) -> bool:
        """Whether the job's budget replaces ``max_steps``. A limit that was set later is this loop's own."""
        return self.in_charge and self._trainer.max_steps == self._max_steps


def take_over_loops(trainer: pl.Trainer, control: LoopControl) -> None:
    """Put a trainer's loops under ``control``, until :func:`release_loops`."""
    mix_in(trainer.fit_loop, _JobFitLoop, control=control)
    mix_in(trainer.fit_loop.epoch_loop, _JobEpochLoop, control=control)


def release_loops(trainer: pl.Trainer) -> None:
    """Restore a trainer's loops."""
    mix_out(trainer.fit_loop)
    mix_out(trainer.fit_loop.epoch_loop)


class _JobFitLoop(FitLoop):
    control: LoopControl

    @property
    @override
    def done(self) -> bool:
        if not self.control.limits_steps:
            return super().done
        if self.control.run_over:
            if self.max_steps != -1:
                rank_zero_info(f"`Trainer.fit` stopped: `max_steps={self.max_steps!r}` reached.")
            return True
        with self._without_max_steps():
            return super().done

    @contextmanager
    def _without_max_steps(self) -> Iterator[None]:
        """Disable ``max_steps`` in the body: a fast worker makes more steps and a slow one fewer."""
        max_steps, self.epoch_loop.max_steps = self.epoch_loop.max_steps, -1
        try:
            yield
        finally:
            self.epoch_loop.max_steps = max_steps


class _JobEpochLoop(TrainingEpochLoop):
    control: LoopControl

    @property
    @override
    def _is_training_done(self) -> bool:
        if not self.control.limits_steps:
            return super()._is_training_done
        return self.control.run_over or self._num_ready_batches_reached()

    @override
    def _num_ready_batches_reached(self) -> bool:
        if self.control.in_charge and self.control.epochs_shared:
            return self.batch_progress.is_last_batch
        return super()._num_ready_batches_reached()

    @override
    def reset(self) -> None:
        """Reset the loop; Lightning alone would take an epoch with a worker's mean number of batches as ended."""
        if not (self.control.in_charge and self.control.epochs_shared):
            super().reset()
            return
        fit_loop = self.trainer.fit_loop
        users, fit_loop.max_batches = fit_loop.max_batches, 1 if self.batch_progress.is_last_batch else float("inf")
        try:
            super().reset()
        finally:
            fit_loop.max_batches = users

    @override
    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        super().update_lr_schedulers(interval, update_plateau_schedulers)
        batch_over = interval == "step" and update_plateau_schedulers
        if batch_over and self.control.in_charge and self.control.after_validation is not None:
            self.control.after_validation()

    @override
    def _should_check_val_fx(self, data_fetcher: DataFetcher) -> bool:
        if not self.control.in_charge or self.trainer.sanity_checking:
            return super()._should_check_val_fx(data_fetcher)
        if not self.control.validates:
            return False
        if self.control.validation_due is None:
            return super()._should_check_val_fx(data_fetcher)
        users, self.trainer.val_check_batch = (
            self.trainer.val_check_batch,
            1 if self.control.validation_due else sys.maxsize,
        )
        try:
            return super()._should_check_val_fx(data_fetcher)
        finally:
            self.trainer.val_check_batch = users

"""The local steps of one virtual worker, made by Lightning's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl

from lightning_async_localsgd.data.loader import count_samples
from lightning_async_localsgd.internals import (
    AutomaticOptimization,
    BatchProgress,
    Progress,
    build_step_arguments,
    call_lightning_module_hook,
    init_optimizers_and_lr_schedulers,
    prepare_batch,
    should_accumulate,
)

__all__ = ["LocalSteps", "MakeBatches", "Passes"]


class Passes(NamedTuple):
    """A worker's training data."""

    batches: Iterator[tuple[Any, int]]
    """An endless iterator of batches, each with its number in the pass."""
    length: int | float
    """Number of batches of a pass; infinite if unknown."""


MakeBatches = Callable[[Callable[[], int]], Passes]
"""Makes a worker's data from a function that returns the shard of its current round."""


class LocalSteps:
    """The training state of a worker: its inner optimizer, schedules, batches, and its position in its passes.

    Args:
        trainer: the trainer; its loop, strategy and precision make the steps. It must be fitting.
        make_batches: makes the worker's data.

    Raises:
        ValueError: if a learning-rate schedule watches a metric.
    """

    def __init__(self, trainer: pl.Trainer, make_batches: MakeBatches) -> None:
        self._trainer = trainer
        self._module = trainer.lightning_module
        self.optimizers, self._schedulers = init_optimizers_and_lr_schedulers(self._module)
        if any(config.reduce_on_plateau for config in self._schedulers):
            raise ValueError(
                "A simulation cannot step a `ReduceLROnPlateau`, which waits for a metric. Use a schedule by steps."
            )
        self._loop = AutomaticOptimization(trainer)
        self._batch_progress = BatchProgress()
        self._epoch_progress = Progress()
        self._shard = 0
        self._passes = make_batches(lambda: self._shard)
        self._scheduled = 0  # steps of the job counted by the schedules

    def enter(self) -> None:
        """Put this worker's state into the trainer's loop."""
        strategy, fit_loop = self._trainer.strategy, self._trainer.fit_loop
        strategy.optimizers, strategy.lr_scheduler_configs = self.optimizers, self._schedulers
        fit_loop.epoch_loop.automatic_optimization = self._loop
        fit_loop.epoch_loop.batch_progress = self._batch_progress
        fit_loop.epoch_progress = self._epoch_progress
        fit_loop.max_batches = self._passes.length

    def make(self, shard: int, job_steps: int) -> tuple[int, float]:
        """Make one local step: as many batches as gradients are accumulated over, fewer at the end of a pass.

        Args:
            shard: the shard of the worker's current round.
            job_steps: steps of the job before it, for the learning-rate schedules.

        Returns:
            Number of samples, and the mean of their training loss.
        """
        self._shard = shard
        self._schedule(job_steps)
        samples, loss, stepped = 0, 0.0, False
        while not stepped:
            batch, batch_idx = next(self._passes.batches)
            if batch_idx == 0:
                self._begin_pass()
            samples += count_samples(batch)
            self._batch_progress.increment_ready()
            stepped = not should_accumulate(self._trainer)
            outputs = self._make_batch(batch, batch_idx)
            loss += float(outputs.get("loss", 0.0))  # already divided by the number of batches of a step
            self._batch_progress.increment_completed()
        return samples, loss

    def _make_batch(self, batch: Any, batch_idx: int) -> Any:
        trainer = self._trainer
        batch = prepare_batch(trainer, trainer.precision_plugin.convert_input(batch))
        call_lightning_module_hook(trainer, "on_train_batch_start", batch, batch_idx)
        self._batch_progress.increment_started()
        arguments = build_step_arguments(trainer, batch, batch_idx)
        outputs = self._loop.run(trainer.optimizers[0], batch_idx, arguments)
        self._batch_progress.increment_processed()
        call_lightning_module_hook(trainer, "on_train_batch_end", outputs, batch, batch_idx)
        return outputs

    def _schedule(self, job_steps: int) -> None:
        for step in range(self._scheduled + 1, job_steps + 1):
            self._step_schedules("step", step)
        self._scheduled = max(self._scheduled, job_steps)

    def _begin_pass(self) -> None:
        """End the previous pass, if any, and begin the next: an epoch of this worker alone."""
        if self._batch_progress.total.ready > 0:
            self._epoch_progress.increment_processed()
            call_lightning_module_hook(self._trainer, "on_train_epoch_end")
            self._step_schedules("epoch", self._trainer.current_epoch + 1)
            self._epoch_progress.increment_completed()
        self._batch_progress.reset_on_run()
        self._epoch_progress.increment_ready()
        call_lightning_module_hook(self._trainer, "on_train_epoch_start")
        self._epoch_progress.increment_started()

    def _step_schedules(self, interval: str, count: int) -> None:
        for config in self._schedulers:
            if config.interval == interval and count % config.frequency == 0:
                self._module.lr_scheduler_step(config.scheduler, None)

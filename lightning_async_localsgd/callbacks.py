"""The callback that the strategy attaches: counts local steps, drives schedulers, ends the run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_async_localsgd.strategy import AsyncLocalSGDStrategy
    from lightning_async_localsgd.worker import Worker

__all__ = ["WorkerCallback"]


class WorkerCallback(pl.Callback):
    """Runs a worker's side of the exchange at the end of every batch in which an optimizer stepped.

    The strategy attaches it before all other callbacks, so that they see the outcome of the exchange.

    Args:
        strategy: the strategy that attaches it.
        trainer: the trainer to attach it to, until :meth:`detach`.
    """

    def __init__(self, strategy: AsyncLocalSGDStrategy, trainer: pl.Trainer) -> None:
        self._strategy = strategy
        self._trainer = trainer
        self._schedulers: _JobSchedulers | None = None
        self._samples = 0
        self._max_steps = trainer.max_steps
        self._job_max_steps = _JobMaxSteps(self._max_steps)
        trainer.fit_loop.epoch_loop.max_steps = self._job_max_steps
        self._callbacks.insert(0, self)

    def detach(self) -> None:
        """Leave the trainer as it was."""
        if self in self._callbacks:  # the learning-rate finder swaps the list
            self._callbacks.remove(self)
        self._trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        if self._schedulers is not None:
            self._schedulers.restore()

    @property
    def _callbacks(self) -> list[pl.Callback]:
        return self._trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, where mypy does not look

    @property
    def _worker(self) -> Worker:
        worker = self._strategy.worker
        assert worker is not None
        return worker

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._schedulers = _JobSchedulers(trainer)
        remaining = max(0, self._max_steps - self._strategy.steps_before_fit(trainer))
        self._job_max_steps.reached = remaining == 0
        self._strategy.begin_training(None if self._max_steps == -1 else remaining)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += _batch_size(batch)
        if not self._strategy.take_optimizer_stepped():
            return
        running = self._worker.step(self._samples)
        self._samples = 0
        self._announce_updates(trainer, pl_module)
        assert self._schedulers is not None
        self._schedulers.advance(self._worker.job_steps)
        if not running:
            if self._worker.stop_requested:  # Lightning is to end as it does after early stopping, validation included
                trainer.should_stop = True
            self._finish(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish before the last epoch's checkpoint is written, so that it holds the final global parameters."""
        last = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
        stopped = trainer.should_stop and trainer.fit_loop._can_stop_early
        if (last or stopped) and self._strategy.summary is None:
            self._finish(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._strategy.summary is None:
            self._finish(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._running(trainer):
            self._worker.pause()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._running(trainer):
            self._worker.resume()

    def _running(self, trainer: pl.Trainer) -> bool:
        return self._schedulers is not None and not trainer.sanity_checking and self._strategy.summary is None

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._strategy.summary = self._worker.finish(stop=trainer.should_stop)
        self._job_max_steps.reached = True
        if self._max_steps == -1:  # some worker asked all to stop
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
        self._announce_updates(trainer, pl_module)
        assert self._schedulers is not None
        self._schedulers.advance(self._worker.job_steps)

    def _announce_updates(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call ``on_outer_update(trainer, pl_module, update)`` of every callback that has it."""
        updates = self._worker.take_updates()
        if not updates:
            return
        listeners = [c.on_outer_update for c in self._callbacks if hasattr(c, "on_outer_update")]
        for update in updates:
            for listener in listeners:
                listener(trainer, pl_module, update)


class _JobMaxSteps(int):
    """``trainer.max_steps`` as the user gave it, but reached when the job's budget is spent.

    Lightning ends a loop when ``global_step >= max_steps``. A fast worker makes more steps than that and a slow one
    fewer, while schedules and progress bars that read ``trainer.max_steps`` should find the user's number. Python asks
    the operand whose class derives from the other's first, so the comparison comes here.
    """

    reached = False

    def __le__(self, other: int) -> bool:
        return self.reached


class _JobSchedulers:
    """Steps the learning-rate schedulers that count steps with the job instead of with this worker's batches.

    Lightning's own stepping is switched off by a ``frequency`` it never reaches; the ``interval`` stays, which
    ``LearningRateMonitor`` reads.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._taken = [
            (config, config.frequency)
            for config in trainer.lr_scheduler_configs
            if config.interval == "step" and not config.reduce_on_plateau
            if trainer.lightning_module.automatic_optimization
        ]
        for config, _ in self._taken:
            config.frequency = sys.maxsize
        self._steps = 0

    def advance(self, job_steps: int) -> None:
        """Make up for the steps that the job has made since the last call."""
        for step in range(self._steps + 1, job_steps + 1):
            for config, frequency in self._taken:
                if step % frequency == 0:
                    self._trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
        self._steps = max(self._steps, job_steps)

    def restore(self) -> None:
        """Give the schedulers back to Lightning."""
        for config, frequency in self._taken:
            config.frequency = frequency


def _batch_size(batch: Any) -> int:
    """Samples in a batch; 0 where Lightning cannot tell."""
    try:
        return extract_batch_size(batch)
    except (MisconfigurationException, RecursionError):
        return 0

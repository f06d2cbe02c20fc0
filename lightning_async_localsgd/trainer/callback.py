"""The strategy's own callback: counts local steps, drives schedulers, validates the global model."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from lightning_async_localsgd.internals import (
    can_stop_early,
    logged_metrics,
    set_logged_metrics,
    should_accumulate,
)
from lightning_async_localsgd.protocol.messages import (
    CheckpointReplaced,
    CheckpointShardSaved,
    LinkCheckpointShard,
    Metrics,
    PlateauMetrics,
)
from lightning_async_localsgd.trainer.checkpoints.saving import JobCheckpoints
from lightning_async_localsgd.trainer.decisions import Decisions
from lightning_async_localsgd.trainer.epochs import JobEpochs
from lightning_async_localsgd.trainer.fetches import Fetches, samples_in_training
from lightning_async_localsgd.trainer.fit import Fit, Phase
from lightning_async_localsgd.trainer.fit_loops import LoopControl, release_loops, take_over_loops
from lightning_async_localsgd.trainer.followers import FollowedMetrics, metric_messages
from lightning_async_localsgd.trainer.guard import Guard, MeanLoss
from lightning_async_localsgd.trainer.meetings import check_pass, learn_decisions
from lightning_async_localsgd.trainer.mixing import mix_in, mix_out
from lightning_async_localsgd.trainer.progress_bar import JobBar, NamedByJob
from lightning_async_localsgd.trainer.same_data import SameData
from lightning_async_localsgd.trainer.schedulers import JobSchedulers
from lightning_async_localsgd.trainer.signals import HeldSignals, saving_signals
from lightning_async_localsgd.worker.rank import WorkerRank

__all__ = ["WorkerCallback"]


class WorkerCallback(pl.Callback):
    """Runs a worker's side of the exchange at the end of every batch with an optimizer step.

    The strategy attaches it before all other callbacks, so that they see the outcome of the exchange.

    Worker 0 validates for all. On the others, callbacks that decide by its metrics (checkpoints, early stopping) do
    nothing until :meth:`detach`; these workers receive the metrics and the decisions of worker 0.

    Args:
        fit: the ``fit``; the callback is attached to its trainer until :meth:`detach`.
        checkpoints: saves this worker's shard of checkpoints.
    """

    def __init__(self, fit: Fit, checkpoints: JobCheckpoints) -> None:
        trainer = fit.trainer
        self._fit = fit
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._schedulers: JobSchedulers | None = None
        self._fetches: Fetches | None = None
        self._scheduler_steps = fit.saved_scheduler_steps
        self._same_data: SameData | None = None
        self._samples = 0
        self._batches = 0  # in this pass over the data
        self._guard: Guard | None = None
        self._loss = MeanLoss()
        self._metrics_before: dict[str, Tensor] = {}
        self._validated: dict[str, float] = {}
        self._validated_once = False
        self._sanity_val_steps = trainer.num_sanity_val_steps
        self._control = LoopControl(trainer, self)
        self._epochs = JobEpochs(fit, trainer, self._control)
        self._signals = HeldSignals()
        self._mixed = list(self._callbacks)
        self._decisions = Decisions(fit, self._mixed)
        self._mix_in()
        self._callbacks.insert(0, self)
        fit.position = self

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or pickle, which takes no part in the job."""
        return vars(self) | {"_checkpoints": None, "_same_data": None, "_signals": HeldSignals()}

    def _mix_in(self) -> None:
        """Make the trainer's loops and callbacks follow the job, and leave the decisions to worker 0's callbacks."""
        take_over_loops(self._trainer, self._control)
        self._control.validates = not self._fit.follows
        self._control.after_validation = self._step_metric_schedulers
        if self._fit.follows:
            self._trainer.num_sanity_val_steps = 0
        for callback in self._mixed:
            if isinstance(callback, ModelCheckpoint) and not self._fit.follows:
                mix_in(callback, NamedByJob, fit=self._fit)
            elif isinstance(callback, pl.callbacks.ProgressBar):
                mix_in(callback, JobBar, fit=self._fit, epochs=self._epochs)

    def detach(self) -> None:
        """Restore the trainer."""
        self._signals.release()
        if self.attached:
            self._decisions.reactivate_callbacks()
            self._callbacks.remove(self)
        for callback in self._mixed:
            mix_out(callback)
        release_loops(self._trainer)
        self._trainer.num_sanity_val_steps = self._sanity_val_steps
        set_logged_metrics(self._trainer, dict(logged_metrics(self._trainer)))
        if self._schedulers is not None:
            self._schedulers.restore()

    def take_part(self) -> None:
        """Run a worker's side of the exchange without a training step."""
        module = self._trainer.lightning_module
        self._fit.together.leave_step()
        self.begin_training()
        self.on_train_end(self._trainer, module)

    @property
    def scheduler_steps(self) -> int:
        """Steps of the job counted by the learning-rate schedulers."""
        return self._schedulers.steps if self._schedulers is not None else self._scheduler_steps

    def fetches_state(self) -> dict[str, Any]:
        """The position of this process in its data; see :meth:`Fetches.state_dict`."""
        return {} if self._fetches is None else self._fetches.state_dict()

    @property
    def _callbacks(self) -> list[pl.Callback]:
        return self._trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set by a connector, where mypy does not look

    @property
    def _worker(self) -> WorkerRank:
        worker = self._fit.worker
        assert worker is not None
        return worker

    @property
    def attached(self) -> bool:
        """Whether the trainer has this callback: the learning-rate finder removes all callbacks for its trial."""
        return self in self._callbacks

    def begin_training(self) -> None:
        """Start the worker. From now on worker 0 decides for all."""
        trainer = self._trainer
        self._decisions.deactivate_callbacks()
        self._fetches = Fetches(trainer, self._fit.device, self._fit.saved_fetches)
        self._fetches.load_places()
        self._epochs.prepare(self._fetches)
        self._fetches.watch()
        open_end = trainer.max_steps == -1
        total = self._epochs.expected_steps if open_end else trainer.max_steps
        before = self._fit.steps_before_fit()
        budget = None if total is None else max(0, total - before)
        self._fit.begin_training(budget, open_end)
        self._epochs.begin_training()
        self._control.run_over = self._worker.budget_spent
        self._signals = HeldSignals(saving_signals(getattr(trainer.strategy, "cluster_environment", None)))
        self._same_data = SameData.where_possible(self._fit, trainer)
        if trainer.is_global_zero and self._fit.place.workers > 1:
            self._guard = Guard(self._fit.settings, budget)
        self._schedulers = JobSchedulers(trainer, self._scheduler_steps, self._fit.follows, self._steps_made, budget)
        self._schedulers.advance(self._worker.job_steps)
        if self._fit.validate_global and self._fit.place.workers > 1:
            set_logged_metrics(trainer, FollowedMetrics(logged_metrics(trainer)))

    def _steps_made(self) -> tuple[int, int]:
        return self._worker.local_steps, self._worker.job_steps

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._fetches is not None
        self._epochs.begin_epoch()
        self._batches = 0
        self._fetches.watch()

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        assert self._fetches is not None
        self._fetches.begin_step()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with self._signals.held():
            self._end_batch(trainer, pl_module, outputs, batch)

    def _end_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any) -> None:
        self._samples += samples_in_training(trainer, batch)
        if self._same_data is not None:
            self._same_data.see(batch)
        self._batches += 1
        if self._guard is not None:
            self._loss.see(outputs)
        accumulating = pl_module.automatic_optimization and should_accumulate(trainer)
        if self._took_step(accumulating):
            self._count_step(trainer, pl_module)
            self._fit.settle_parameters()
        self._epochs.count_batch()
        if self._epochs.at_the_end and self._fit.summary is None:
            self._finish(trainer, pl_module)  # before worker 0 validates the final model
        if self._fit.phase is Phase.FINISHED and not self._validated_once:
            self._epochs.validate_what_has_come_of_it()

    def _took_step(self, accumulating: bool) -> bool:
        assert self._fit.steps is not None
        made = self._fit.steps.take(accumulating)
        if made:
            self._checkpoints.forget_cut()
        return made

    def _count_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        running = self._worker.step(self._samples * self._fit.place.worker_size)
        self._samples = 0
        self._announce_updates(trainer, pl_module)
        assert self._schedulers is not None
        self._schedulers.advance(self._worker.job_steps)
        self.handle_messages()
        if not running:
            if self._worker.stop_requested:  # end as after early stopping, with a validation
                trainer.should_stop = True
            self._finish(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish before the last epoch's checkpoint, so that the checkpoint holds the final global parameters."""
        check_pass(trainer, self._worker.rank, self._batches)
        if self._running(trainer) and self._fit.leads:
            self._send_plateaus(trainer)
        stopped = trainer.should_stop and can_stop_early(trainer)
        if (self._epochs.is_last or stopped) and self._fit.summary is None:
            self._finish(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Broadcast worker 0's decisions: all processes are in step again, for the other hooks of this name."""
        if self._fit.summary is None:
            self._finish(trainer, pl_module)
        self._decisions.reactivate_callbacks()
        if self._fit.validate_global:
            learn_decisions(self._fit.job, partial(self._decisions.broadcast, metrics=self._validated))
        self._fit.together.meet_again(run_complete=True)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._fit.failed = True

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._metrics_before = dict(trainer.callback_metrics)
        if self._running(trainer):
            self._worker.pause()
            self._checkpoints.forget_cut()
            if self._fit.leads:
                self._worker.swap_in_global()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            list(metric_messages({str(name): 0.0 for name in trainer.callback_metrics}))  # refuses long names early
            return
        self._validated_once = True
        before = self._metrics_before
        new = {
            k: float(v) for k, v in trainer.callback_metrics.items() if k not in before or not torch.equal(v, before[k])
        }
        self._validated.update(new)
        if self._running(trainer) and self._fit.leads:
            for message in metric_messages(new):
                self._worker.send(message)

    def after_validation(self) -> None:
        """Act after all ``on_validation_end`` hooks, until which callbacks may have other weights in the module."""
        if self._running(self._trainer):
            if self._fit.leads:
                self._worker.swap_in_local()
            self._fit.settle_parameters()
            self._worker.resume()

    def _step_metric_schedulers(self) -> None:
        """Step schedulers that watch metrics, after each batch and its validation."""
        if self._schedulers is not None and not self._trainer.sanity_checking:
            self._schedulers.step_by_metrics(self._validated_once)

    def _send_plateaus(self, trainer: pl.Trainer) -> None:
        """Send the metric values of worker 0's ``ReduceLROnPlateau`` schedulers to the other workers."""
        values = [
            float(trainer.callback_metrics[str(config.monitor)])
            if (trainer.current_epoch + 1) % config.frequency == 0 and config.monitor in trainer.callback_metrics
            else None
            for config in trainer.lr_scheduler_configs
            if config.reduce_on_plateau and config.interval == "epoch"
        ]
        if any(value is not None for value in values):
            self._worker.send(PlateauMetrics(tuple(values)))

    def handle_messages(self) -> None:
        """Handle worker 0's messages."""
        self._checkpoints.check()
        for sender, message in self._worker.take_messages():
            if isinstance(message, CheckpointShardSaved) and self._trainer.is_global_zero:
                self._checkpoints.hear_saved_shard(sender, message)
            elif sender == self._worker.rank:
                continue  # it has done so itself
            elif isinstance(message, LinkCheckpointShard):
                self._checkpoints.link_shard(message)
            elif isinstance(message, CheckpointReplaced):
                self._checkpoints.forget_replaced(message)
            elif isinstance(message, Metrics):
                self._trainer.callback_metrics.update({k: torch.tensor(v) for k, v in message.values.items()})
            elif isinstance(message, PlateauMetrics):
                assert self._schedulers is not None
                self._schedulers.step_plateaus(message.values)

    def _running(self, trainer: pl.Trainer) -> bool:
        return self._schedulers is not None and not trainer.sanity_checking and self._fit.summary is None

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self._worker.paused():
            self._checkpoints.prepare_to_end()
        self._fit.finish(self._worker.finish(stop=trainer.should_stop))
        self._control.run_over = trainer.max_steps != -1 or self._worker.stop_requested
        self._announce_updates(trainer, pl_module)
        assert self._schedulers is not None
        self._schedulers.advance(self._worker.job_steps)
        self.handle_messages()

    def _announce_updates(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Call ``on_outer_update(trainer, pl_module, update)`` of every callback with such a method."""
        updates = self._worker.take_updates()
        if not updates:
            return
        if self._guard is not None:
            self._guard.watch(updates, self._loss, self._worker)
        listeners = [c.on_outer_update for c in self._callbacks if hasattr(c, "on_outer_update")]
        for update in updates:
            for listener in listeners:
                listener(trainer, pl_module, update)

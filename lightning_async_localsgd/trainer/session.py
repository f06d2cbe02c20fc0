"""The session of a ``fit``: its parts, held together from the meeting of its processes to the strategy's teardown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from lightning.pytorch.callbacks import BaseFinetuning
from torch.distributed import PrefixStore, ProcessGroup
from torch.optim import Optimizer

from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.trainer.callback import WorkerCallback
from lightning_async_localsgd.trainer.checkpoints.saving import JobCheckpoints
from lightning_async_localsgd.trainer.final_module import FinalModule
from lightning_async_localsgd.trainer.fit import Fit, Phase
from lightning_async_localsgd.trainer.global_checkpoints import GlobalCheckpoints
from lightning_async_localsgd.trainer.loaders import TrainingLoaders
from lightning_async_localsgd.trainer.meetings import meet_before_training
from lightning_async_localsgd.version import __version__
from lightning_async_localsgd.worker.device_group import DeviceGroup, FirstRank, OtherRank
from lightning_async_localsgd.worker.rank import WorkerRank
from lightning_async_localsgd.worker.step_watch import StepWatch
from lightning_async_localsgd.worker.worker import Worker

__all__ = ["Session"]


class Session:
    """Makes the parts of a ``fit`` when it is time to, and takes them down in the end.

    Args:
        fit: the ``fit``.
        loop_reads: tells whether it is the training loop that reads a loader.
    """

    def __init__(self, fit: Fit, loop_reads: Callable[[], bool]) -> None:
        self.fit = fit
        self.loaders = TrainingLoaders(fit, loop_reads)
        self.checkpoints: JobCheckpoints | None = None
        """From :meth:`set_up` on."""
        self._callback: WorkerCallback | None = None
        self._global_checkpoints: GlobalCheckpoints | None = None

    def set_up(
        self, checkpoints: JobCheckpoints, optimizers: Sequence[Optimizer], devices: ProcessGroup | None
    ) -> None:
        """Make the worker and what works with it.

        Args:
            checkpoints: saves the worker's shard of checkpoints.
            optimizers: the inner optimizers.
            devices: the process group of the worker's devices; None if it has one device.
        """
        fit = self.fit
        self.checkpoints = checkpoints
        fit.set_worker(self._make_worker(checkpoints, optimizers, devices))
        fit.steps = StepWatch(fit.trainer.lightning_module, optimizers)
        self._callback = WorkerCallback(fit, checkpoints)
        self._global_checkpoints = GlobalCheckpoints(fit.trainer, fit)

    def _make_worker(
        self, checkpoints: JobCheckpoints, optimizers: Sequence[Optimizer], devices: ProcessGroup | None
    ) -> WorkerRank:
        trainer, place, job = self.fit.trainer, self.fit.place, self.fit.job
        module, settings = trainer.lightning_module, self._settings
        device_group = None
        if place.worker_size > 1:
            assert devices is not None
            store = PrefixStore(f"worker{place.worker_rank}", job.store)
            device_group = DeviceGroup(store, place.device_rank, place.worker_size, devices, job.address)
            if place.device_rank > 0:
                other = OtherRank(device_group, module, optimizers, place.worker_rank, settings)
                other.on_gather = checkpoints.pack_fetches
                return other
        worker = (partial(FirstRank, device_group) if device_group is not None else Worker)(
            module,
            optimizers,
            job.store,
            place.worker_rank,
            place.workers,
            settings,
            {"lightning_async_localsgd": __version__, "max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
            | {"worker_size": place.worker_size},
        )
        worker.on_cut = checkpoints.save_shard
        worker.on_progress = self._handle_messages
        return worker

    @property
    def _settings(self) -> Settings:
        """The settings of the run. Frozen parameters are exchanged if a callback may unfreeze them in this ``fit``."""
        settings = self.fit.settings
        if settings.exchange_frozen is not None:
            return settings
        callbacks = self.fit.trainer.callbacks  # type: ignore[attr-defined]
        return replace(settings, exchange_frozen=any(isinstance(c, BaseFinetuning) for c in callbacks))

    def _handle_messages(self) -> None:
        if self._callback is not None:
            self._callback.handle_messages()

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def begin_training(self) -> None:
        """Start the worker; not in a trial of the learning-rate finder, which takes all callbacks away."""
        if self._callback is not None and self._callback.attached:
            self._callback.begin_training()

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """From now on these are the inner optimizers."""
        if self.fit.steps is not None:
            self.fit.steps.watch(optimizers)
        if self.fit.worker is not None:
            self.fit.worker.watch(optimizers)

    def after_validation(self) -> None:
        """After the hooks of all callbacks and of the module."""
        if self._callback is not None:
            self._callback.after_validation()

    def fail(self, error: BaseException) -> None:
        """This process has met an error: the worker leaves."""
        self.fit.failed = True
        if self.fit.worker is not None:
            self.fit.worker.abort(error)

    def end(self) -> None:
        """End this process' part, and leave the trainer as it was."""
        try:
            if self._callback is not None:
                self._detach(self._callback)
        finally:
            if self.fit.steps is not None:
                self.fit.steps.close()
            self.loaders.close()

    def _detach(self, callback: WorkerCallback) -> None:
        try:
            self._leave_together(callback)
        finally:
            callback.detach()
            if self._global_checkpoints is not None:
                self._global_checkpoints.detach()
            self._callback = self._global_checkpoints = None

    def _leave_together(self, callback: WorkerCallback) -> None:
        fit = self.fit
        if fit.goes_on and fit.phase is Phase.MEETING and not fit.failed:
            # Its epochs were over in the checkpoint, so that Lightning did not train at all: the others need it still.
            callback.take_part()
        if fit.failed:
            return
        if fit.phase is Phase.MEETING:
            meet_before_training(fit.job, trains=False)
        elif fit.phase is Phase.FINISHED:
            FinalModule(fit.job).attach(fit.trainer)

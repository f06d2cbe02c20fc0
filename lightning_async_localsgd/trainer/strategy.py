"""The seam with Lightning: a strategy whose hooks hand over to the process world and to the session of a ``fit``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_async_localsgd.aliasing import hint_of_other_lightning
from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.outer import Constraint, OuterOptimizerFactory, Transform
from lightning_async_localsgd.protocol.pace import Pace
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.settings.arguments import check_names, names_of
from lightning_async_localsgd.trainer.checkpoints.files import CheckpointFiles
from lightning_async_localsgd.trainer.checkpoints.restoring import Restoring
from lightning_async_localsgd.trainer.checkpoints.saving import KEY, JobCheckpoints, is_local
from lightning_async_localsgd.trainer.checkpoints.writing import StreamingCheckpointIO
from lightning_async_localsgd.trainer.checks import (
    check_callbacks,
    check_finders,
    check_optimizers,
    check_phase_of_loading,
)
from lightning_async_localsgd.trainer.fit import Fit
from lightning_async_localsgd.trainer.process_world import ProcessWorldStrategy, explain_missing_group
from lightning_async_localsgd.trainer.session import Session
from lightning_async_localsgd.worker.rank import WorkerRank
from lightning_async_localsgd.worker.summary import RunSummary

__all__ = ["AsyncLocalSGDStrategy"]


class AsyncLocalSGDStrategy(ProcessWorldStrategy):
    """Trains any LightningModule with asynchronous Local-SGD: one worker per device, each at its own pace.

    A background thread per worker exchanges pseudo-gradients, and every worker applies the same outer updates in the
    same order to its copy of the global parameters, so that all copies stay bit-identical. After ``fit`` the module of
    every process holds the final global parameters, and ``summary`` tells how the run went.

    Example::

        trainer = L.Trainer(devices=4, max_steps=20_000, strategy=AsyncLocalSGDStrategy())
        trainer.fit(model, datamodule)
        print(trainer.strategy.summary)

    Args:
        local_steps: H, local steps per round of the fastest worker. ``"auto"``: as few as are cheap, by the measured
            time of a step and of an exchange and by the length of the run (docs/cold-start.md).
        outer_optimizer: makes the outer optimizer from the global parameters, such as ``partial(torch.optim.SGD,
            lr=0.7, momentum=0.9, nesterov=True)``. None: ``DelayedNesterov`` whose momentum grows with the steps. For
            pretrained parameters pass ``DelayedNesterov`` itself, whose momentum is there from the first step.
        pace: ``"dylu"`` (slow workers make fewer steps per round, so that all rounds take the same time), ``"fixed"``
            (H for everyone), or an object with ``steps(speeds, local_steps)`` and ``tolerance``.
        grace_period: seconds that an exchange waits for workers that are about to finish their round as well; with
            ``overlap`` at least two of their steps or a tenth of their round.
        quorum: deltas to wait for before their mean moves the outer state. All workers': synchronous DiLoCo.
        overlap: keep training while a delta is in flight. False: wait for the exchange, as in the paper.
        budget: ``"shared"``: fast workers make more of the ``max_steps`` times workers. ``"per_worker"``: equally many.
        worker_size: n consecutive ranks form one worker, which trains as under DDP, with batches n times as large.
        codec: form of deltas on the wire: ``"fp32"``, ``"bf16"``, ``"int8"``, ``"int4"``, ``"e3m0"``, ``"topk"`` or a
            codec object. ``"auto"``: the widest of the first four with which an exchange takes a tenth of a round.
        exchange: ``"reduce"``: deltas are added up on their way, so that traffic does not grow with the number of
            workers. ``"gather"``: each goes to every worker. ``"auto"``: ``"reduce"``, unless single deltas are needed.
        fragments: parts of the model that are exchanged one after the other in a round (Streaming DiLoCo): each is on
            its way for a part of the time.
        merge: what becomes of steps that a worker makes during an exchange: ``"rebase"``: all are kept. A number α from
            0 to 1: the local parameters become α times themselves plus 1 - α times the global ones (Streaming DiLoCo).
        turns_per_round: maximum number of exchanges of a fragment in a round of the fastest; "auto": by their time.
        outer_device: where the global state lives: ``"cpu"`` or a device of the worker.
        timeout: how long a worker may take to answer before the others give up with an error that names it.
        validate_global: worker 0 alone validates, the global parameters on the whole validation set, while the others
            train on; they are told the metrics. False: each worker validates its own parameters.
        exchange_frozen: exchange frozen parameters too, to unfreeze them later. None: with a callback that does so.
        transforms: what every pseudo-gradient goes through, in this order, before the outer optimizer: objects of
            ``lightning_async_localsgd.outer``, such as ``Poly()``, or your own (see its ``Transform``).
        weight_copies: names of the entries in the inner optimizers' state that hold copies of the weights (fp32
            masters). They move with the weights. None: those found by their values, with a warning.
        local_buffers: names or patterns of buffers, full or their last part, that each worker keeps for itself during
            ``fit`` and that are worker 0's after it: ``["queue", "*.cache"]``.
        same_data: workers are meant to train on the same batches. False: a warning says so if they do.
        constraint: a function that imposes a constraint on parameters in place, given by name (weight clipping): on the
            global ones after each outer update, on the exchange thread, and on this worker's after each adoption.
        **kwargs: further arguments of Lightning's ``DDPStrategy``, such as ``cluster_environment``, ``checkpoint_io``
            or ``start_method``; and of torch's ``DistributedDataParallel``, for workers of several devices.

    Raises:
        TypeError: if there is no such argument.
        ValueError: if an argument is outside its range.

    References:
        Liu et al. 2024, Asynchronous Local-SGD Training for Language Modeling (arXiv 2401.09135).
    """

    strategy_name = "async_localsgd"

    def __init__(
        self,
        local_steps: int | str = "auto",
        outer_optimizer: OuterOptimizerFactory | None = None,
        pace: str | Pace = "dylu",
        grace_period: float = 0.05,
        quorum: int = 1,
        overlap: bool = True,
        budget: str = "shared",
        worker_size: int = 1,
        codec: str | Codec = "auto",
        exchange: str = "auto",
        fragments: int = 1,
        merge: str | float = "rebase",
        turns_per_round: float | str = "auto",
        outer_device: str | torch.device = "cpu",
        timeout: timedelta = timedelta(minutes=10),
        validate_global: bool = True,
        exchange_frozen: bool | None = None,
        transforms: Sequence[Transform] = (),
        weight_copies: Sequence[str] | None = None,
        local_buffers: Sequence[str] = (),
        same_data: bool = False,
        constraint: Constraint | None = None,
        **kwargs: Any,
    ) -> None:
        check_names(kwargs, _KNOWN_ARGUMENTS, "AsyncLocalSGDStrategy")
        super().__init__(worker_size, validate_global, timeout=timeout, **kwargs)
        self.settings = Settings(
            local_steps=local_steps,
            outer_optimizer=outer_optimizer,
            pace=pace,
            grace_period=grace_period,
            quorum=quorum,
            overlap=overlap,
            budget=budget,
            codec=codec,
            exchange=exchange,
            fragments=fragments,
            merge=merge,
            turns_per_round=turns_per_round,
            outer_device=outer_device,
            timeout=timeout,
            exchange_frozen=exchange_frozen,
            transforms=transforms,
            weight_copies=weight_copies,
            local_buffers=local_buffers,
            constraint=constraint,
        )
        self.same_data = same_data
        self._session: Session | None = None  # of a `fit`
        self._summary: RunSummary | None = None  # of the last one that is over
        self._steps_made: int | None = None  # by the job

    def __repr__(self) -> str:  # with it alone the `Trainer` of another Lightning refuses this object
        return f"<{type(self).__name__}{hint_of_other_lightning()}>"

    def __getstate__(self) -> dict[str, Any]:  # a copy, or a pickle, takes no part in the job
        return super().__getstate__() | {"_session": None}

    @property
    def worker(self) -> WorkerRank | None:
        """This process' worker, during ``fit``."""
        return self._fit.worker if self._fit is not None else None

    @property
    def summary(self) -> RunSummary | None:
        """The last finished run in numbers."""
        return self._fit.summary if self._fit is not None else self._summary

    @summary.setter
    def summary(self, summary: RunSummary | None) -> None:
        self._summary = summary

    # ---- fit --------------------------------------------------------------------------------------------------------

    @property
    def _fit(self) -> Fit | None:
        return self._session.fit if self._session is not None else None

    @override
    def setup_distributed(self) -> None:
        trainer = self.lightning_module.trainer if self.lightning_module is not None and self._fitting else None
        if trainer is not None:
            check_finders(trainer)
        self.take_place()
        self.settings.check_workers(self.workers)
        self.meet()
        if trainer is None:
            return
        fit = Fit(
            trainer,
            self.place,
            self.settings,
            self.job,
            self.root_device,
            self,
            self.validate_global,
            self.same_data,
            self._steps_made,
        )
        self._session = Session(fit, lambda: self._reading is not None and self._reading.by_loop)
        self.begin_groups(dist.group.WORLD)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Have the user's map-style training loader read this worker's part of the data."""
        if self._session is None or not self._fitting:
            return dataloader
        return self._session.loaders.process(dataloader)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert self._session is not None and self._groups is not None
        check_callbacks(trainer)
        self.job.barrier()  # who comes later has more to prepare; from here on `timeout` counts
        check_optimizers(self.optimizers)
        checkpoints = JobCheckpoints(self._session.fit, lambda: self.checkpoint_io, super().remove_checkpoint)
        self._session.set_up(checkpoints, self.optimizers, self._groups.worker)

    @override
    def on_train_start(self) -> None:
        """Lightning calls this after the hooks of that name of all callbacks and of the module: all meet in those."""
        self.leave_step()
        if self._session is not None:
            self._session.begin_training()

    @override
    def on_train_end(self) -> None:
        self.meet_again()  # after a trial of the learning-rate finder

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of this ``fit``; others may be put in their place at any time."""
        return super().optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        DDPStrategy.optimizers.fset(self, optimizers)  # type: ignore[attr-defined]
        if self._session is not None:
            self._session.watch(optimizers)

    @override
    def on_validation_end(self) -> None:
        """Lightning calls this after the hooks of that name of all callbacks and of the module."""
        super().on_validation_end()
        if self._session is not None:
            self._session.after_validation()

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain_missing_group(exception)
        if self._session is not None:
            self._session.fail(exception)
        if self._job is not None:
            self._job.fail(exception)

    @override
    def teardown(self) -> None:
        session = self._session
        if session is not None:
            try:
                session.end()
            finally:
                self._summary, self._steps_made = session.fit.summary, session.fit.steps_after_fit
                self._session = None
        self.end_groups()
        super().teardown()
        if session is not None and session.checkpoints is not None:
            session.checkpoints.wait_until_written()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> JobCheckpoints | None:
        return self._session.checkpoints if self._session is not None else None

    @property
    def job_steps(self) -> int:
        """Steps of the job so far: local steps of all workers over their number."""
        return self._fit.job_steps if self._fit is not None else self._steps_made or 0

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """How Lightning files are written: the user's way, or Lightning's without copies in memory."""
        io = super().checkpoint_io
        if type(io) is TorchCheckpointIO:
            io = self._checkpoint_io = StreamingCheckpointIO()
        return io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._checkpoint_io = io

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What checkpoints hold: during ``fit`` the global parameters, not this worker's own."""
        state = super().lightning_module_state_dict()
        return state if self._checkpoints is None else self._checkpoints.put_global(state)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the global model with worker 0's shard of the checkpoint, and have the others write theirs beside it.

        The checkpoint's ``global_step`` is worker 0's own; the job's count of steps is beside it.
        """
        checkpoint[KEY] = {"job_steps": self.job_steps, "workers": self.workers}
        write = partial(super().save_checkpoint, storage_options=storage_options)
        if self._checkpoints is None:
            write(checkpoint, filepath)
        else:
            self._checkpoints.save(checkpoint, filepath, write)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint with all workers' shards, once those that replace it are complete."""
        delete = super().remove_checkpoint
        if not (self.is_global_zero and is_local(filepath)):
            delete(filepath)
            return
        files = self._checkpoints.files if self._checkpoints is not None else CheckpointFiles(delete)
        files.remove(os.path.abspath(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if self._fit is not None:
            check_phase_of_loading(self._fit.phase)
        if not self._fitting or self._fit is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        restoring = Restoring(self.place, super().load_checkpoint, self.broadcast, weights_only)
        checkpoint, resumed = restoring.restore(str(checkpoint_path))
        self._fit.go_on_from(resumed)
        return checkpoint


_KNOWN_ARGUMENTS = names_of(AsyncLocalSGDStrategy, DDPStrategy, DistributedDataParallel) - {
    *("module", "device_ids")  # which Lightning gives
}

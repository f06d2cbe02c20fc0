"""The seam with Lightning: worker-scoped process world, setup, optimizer steps, teardown."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import BaseFinetuning, BatchSizeFinder, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import PrefixStore, Store
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_async_localsgd.aliasing import hint_of_other_lightning
from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.membership import join_job
from lightning_async_localsgd.membership.address import listening_at
from lightning_async_localsgd.outer import Constraint, OuterOptimizerFactory, Transform
from lightning_async_localsgd.protocol.pace import Pace
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.settings.arguments import check_names, names_of
from lightning_async_localsgd.trainer.callback import WorkerCallback
from lightning_async_localsgd.trainer.checkpoints.files import CheckpointFiles
from lightning_async_localsgd.trainer.checkpoints.restoring import Restoring
from lightning_async_localsgd.trainer.checkpoints.saving import KEY, JobCheckpoints
from lightning_async_localsgd.trainer.checkpoints.writing import StreamingCheckpointIO
from lightning_async_localsgd.trainer.collectives import CollectiveStrategy, explain_missing_group
from lightning_async_localsgd.trainer.final_module import FinalModule
from lightning_async_localsgd.trainer.fit import Fit, Phase, Place
from lightning_async_localsgd.trainer.global_checkpoints import GlobalCheckpoints
from lightning_async_localsgd.trainer.launching import ForkingLauncher, ScriptLauncher, check_start_method
from lightning_async_localsgd.trainer.loaders import TrainingLoaders
from lightning_async_localsgd.trainer.meetings import meet_before_training
from lightning_async_localsgd.version import __version__
from lightning_async_localsgd.worker.device_group import Crew, FollowingRank, LeadingWorker
from lightning_async_localsgd.worker.rank import WorkerRank
from lightning_async_localsgd.worker.step_watch import StepWatch
from lightning_async_localsgd.worker.summary import RunSummary
from lightning_async_localsgd.worker.worker import Worker

__all__ = ["AsyncLocalSGDStrategy"]


class AsyncLocalSGDStrategy(CollectiveStrategy):
    """Trains any LightningModule with asynchronous Local-SGD: one worker per device, each at its own pace.

    Workers train on their own copies of the model. A background thread per worker exchanges pseudo-gradients, and every
    worker applies the same outer updates in the same order to its copy of the global parameters, so that all copies
    stay bit-identical. After ``fit`` the module of every process holds the final global parameters, and ``summary``
    tells how the run went.

    Example::

        trainer = L.Trainer(devices=4, max_steps=20_000, strategy=AsyncLocalSGDStrategy())
        trainer.fit(model, datamodule)
        print(trainer.strategy.summary)

    Args:
        local_steps: H, local steps per round of the fastest worker. ``"auto"``: as few as are cheap, by the measured
            time of a step and of an exchange and by the length of the run, and at most 50 unless an exchange takes
            longer (docs/cold-start.md).
        outer_optimizer: makes the outer optimizer from the global parameters, for instance
            ``functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)``; None:
            ``DelayedNesterov`` whose momentum grows with the rounds, right from scratch. After a pretraining pass
            ``DelayedNesterov`` itself, whose momentum is there from the first step.
        pace: ``"dylu"`` (slow workers make fewer steps per round, so that all rounds take the same time), ``"fixed"``
            (H for everyone), or an object with ``steps(speeds, local_steps)`` and ``tolerance``.
        grace_period: seconds that an exchange waits for workers who are about to finish their round as well (with
            ``overlap``, at least two of their steps or a tenth of their round, for nobody waits meanwhile; but no
            longer than the fastest takes for a round).
        quorum: deltas to wait for before the outer state moves. 1: every delta is an outer update as it comes. More:
            the mean of the deltas at hand is one. The number of workers: synchronous DiLoCo.
        overlap: keep training while a delta is in flight, and add what was learned meanwhile to the new global
            parameters. False: wait for them, as in the paper.
        budget: ``"shared"``: all workers together make ``max_steps`` times workers local steps, the fast ones more of
            them. ``"per_worker"``: each worker makes ``max_steps``.
        worker_size: n consecutive ranks form one worker, which trains as under DDP (with the further arguments of this
            strategy): its batch is n times as large. Its first rank takes part in the exchange.
        codec: how deltas are written on the wire: ``"fp32"``, ``"bf16"`` or a codec object.
        outer_device: where the global state lives: ``"cpu"`` or a device of the worker.
        timeout: how long a worker may take to answer before the others give up with an error that names it.
        validate_global: in ``fit`` worker 0 alone validates, the global parameters on the whole validation set, while
            the others train on; they are told the metrics. False: each worker validates its own parameters.
        exchange_frozen: exchange frozen parameters too, at the cost of trainable ones, so that they can be unfrozen
            during ``fit``. None: if the trainer has a callback that does so, a Lightning ``BaseFinetuning``.
        transforms: what every pseudo-gradient goes through, in this order, before the outer optimizer: objects of
            ``lightning_async_localsgd.outer``, such as ``Poly()``, or your own (see its ``Transform``).
        weight_copies: names of the entries in the inner optimizers' state that hold copies of the weights (fp32
            masters, slow weights, base sequences). They move with the weights. None: those that are found by their
            values, with a warning.
        local_buffers: names of buffers, or patterns of them, that each worker keeps for itself during ``fit`` and that
            are worker 0's after it: ``["queue", "*.cache"]``. A pattern means the full name or the last part of it.
        same_data: workers are meant to train on the same batches. False: a warning says so if they do.
        constraint: a function that changes parameters in place so that they keep a constraint which the module imposes
            after each of its steps (weight clipping, a projection). It is called with a mapping from the parameters'
            names to the parameters, without gradients: with the global ones after each outer update, on the exchange
            thread, and with this worker's own after each adoption. It must do the same on every worker.
        **kwargs: further arguments of Lightning's ``DDPStrategy``, such as ``cluster_environment``,
            ``checkpoint_io``, ``process_group_backend`` (of the group used outside ``fit``) or ``start_method``; and of
            torch's ``DistributedDataParallel``, which workers of several devices use.

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
        codec: str | Codec = "fp32",
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
        super().__init__(timeout=timeout, **kwargs)
        if worker_size < 1:
            raise ValueError(f"`worker_size` must be at least 1, got {worker_size}.")
        self.worker_size = worker_size
        self.settings = Settings(
            local_steps=local_steps,
            outer_optimizer=outer_optimizer,
            pace=pace,
            grace_period=grace_period,
            quorum=quorum,
            overlap=overlap,
            budget=budget,
            codec=codec,
            outer_device=outer_device,
            timeout=timeout,
            exchange_frozen=exchange_frozen,
            transforms=transforms,
            weight_copies=weight_copies,
            local_buffers=local_buffers,
            constraint=constraint,
        )
        self.validate_global = validate_global
        self.same_data = same_data
        self._fit: Fit | None = None
        # Parts of a `fit`, in the order in which they come.
        self._loaders: TrainingLoaders | None = None
        self._checkpoints: JobCheckpoints | None = None
        self._callback: WorkerCallback | None = None
        self._global_checkpoints: GlobalCheckpoints | None = None
        # Of the last one that is over.
        self._summary: RunSummary | None = None
        self._steps_made: int | None = None  # by the job

    def __repr__(self) -> str:
        """The `Trainer` of another Lightning refuses this object with its `repr` alone, which then tells the way."""
        return f"<{type(self).__name__}{hint_of_other_lightning()}>"

    # ---- the process world ------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        check_start_method(self._start_method, self.cluster_environment)
        if self._start_method == "popen":
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = ForkingLauncher(self, start_method=self._start_method)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, takes no part in the job."""
        parts = ("_fit", "_loaders", "_checkpoints", "_callback", "_global_checkpoints", "_job", "_groups", "_reading")
        return super().__getstate__() | dict.fromkeys(parts)

    @property
    def place(self) -> Place:
        """The place of this process among those of the job."""
        return Place(self.global_rank, self.world_size, self.worker_size)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.place.workers

    @property
    def worker_rank(self) -> int:
        """The worker that this process belongs to."""
        return self.place.worker_rank

    @property
    def device_rank(self) -> int:
        """Rank of this process within its worker."""
        return self.place.device_rank

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

    @override
    def setup_distributed(self) -> None:
        """Meet the other processes. In ``fit`` several default process groups take turns; see :class:`Groups`."""
        reset_seed()
        self.set_world_ranks()
        if self._fitting:
            assert self.lightning_module is not None
            _check_finders(self.lightning_module.trainer)
        if self.world_size % self.worker_size != 0:
            raise ValueError(
                f"{self.world_size} processes do not make workers of `worker_size={self.worker_size}`. Start a "
                "multiple of it, or choose another size."
            )
        self.settings.check_workers(self.workers)
        if self._groups is not None:  # of the last `fit`
            self._groups.close()
            self._groups = None
        if dist.is_initialized():
            raise MisconfigurationException(
                "A default process group exists already, and metrics would be reduced over it while workers are out of "
                "step. Call `torch.distributed.destroy_process_group()` before this."
            )
        assert self.cluster_environment is not None
        os.environ["MASTER_ADDR"] = self.cluster_environment.main_address
        os.environ["MASTER_PORT"] = str(self.cluster_environment.main_port)
        self._job = join_job(self.global_rank, self.world_size, self.settings.timeout, self.worker_size)
        store = self._job.next_stage()
        if not self._fitting:
            self._init_process_group(store, self.global_rank, self.world_size)
            return
        if self.worker_size > 1:
            own_store = PrefixStore(f"worker{self.place.worker_rank}", store)
            self._init_process_group(own_store, self.place.device_rank, self.worker_size)
        assert self.lightning_module is not None
        self._fit = Fit(
            self.lightning_module.trainer,
            self.place,
            self.settings,
            self._job,
            self.root_device,
            self,
            self.validate_global,
            self.same_data,
            self._steps_made,
        )
        self._loaders = TrainingLoaders(self._fit, lambda: self._reading is not None and self._reading.by_loop)
        self.begin_groups(dist.group.WORLD)

    def _init_process_group(self, store: Store, rank: int, size: int) -> None:
        self._process_group_backend = self._get_process_group_backend()
        assert self._job is not None
        with listening_at(self._job.address):
            dist.init_process_group(
                self._process_group_backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=self.settings.timeout,
                device_id=self.root_device if self.root_device.type == "cuda" else None,
            )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """In ``fit`` the devices of a worker share validation data; :meth:`process_dataloader` divides the rest."""
        if not self._fitting:
            return super().distributed_sampler_kwargs
        assert self.lightning_module is not None
        if self.lightning_module.trainer.training:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.worker_size, "rank": self.place.device_rank}

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Have the user's map-style training loader read this worker's part of the data."""
        if not self._fitting or not isinstance(dataloader, DataLoader):
            return dataloader
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        # With a batch sampler of the user's own, that is where Lightning puts the sampler.
        sampler = getattr(dataloader.batch_sampler, "sampler", dataloader.sampler)
        overfitting = trainer.overfit_batches > 0  # type: ignore[attr-defined]
        if not trainer.training or overfitting:
            return dataloader
        # Lightning has just put a sampler over all of the data under a copy of it, unless the user asked for their own.
        if not isinstance(sampler, DistributedSampler) or sampler.num_replicas != 1:
            return dataloader
        assert self._job is not None and self._loaders is not None
        return self._loaders.divide(dataloader, sampler.seed, trainer, self._job.store)

    # ---- fit --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert self._fit is not None and self.lightning_module is not None
        _check_callbacks(trainer, self.lightning_module)
        self._fit.job.barrier()  # who comes later has more to prepare; from here on `timeout` counts
        if any(isinstance(optimizer, ZeroRedundancyOptimizer) for optimizer in self.optimizers):
            raise MisconfigurationException(
                "`ZeroRedundancyOptimizer` gathers its state in a collective call, which checkpoints of workers that "
                "are out of step cannot make. Use the optimizer that it wraps."
            )
        self._checkpoints = JobCheckpoints(self._fit, lambda: self.checkpoint_io, super().remove_checkpoint)
        self._fit.set_worker(self._make_worker(self._fit, self._checkpoints))
        self._fit.steps = StepWatch(self.lightning_module, self.optimizers)
        self._callback = WorkerCallback(self._fit, self._checkpoints)
        self._global_checkpoints = GlobalCheckpoints(trainer, self._fit)

    def _make_worker(self, fit: Fit, checkpoints: JobCheckpoints) -> WorkerRank:
        assert self.lightning_module is not None
        trainer, place = fit.trainer, fit.place
        settings = replace(self.settings, exchange_frozen=self._unfreezes(trainer))
        crew = None
        if self.worker_size > 1:
            store = PrefixStore(f"worker{place.worker_rank}", fit.job.store)
            assert self._groups is not None and self._groups.worker is not None
            crew = Crew(store, place.device_rank, self.worker_size, self._groups.worker, fit.job.address)
            if place.device_rank > 0:
                follower = FollowingRank(crew, self.lightning_module, self.optimizers, place.worker_rank, settings)
                follower.on_gather = checkpoints.pack_fetches
                return follower
        worker = (partial(LeadingWorker, crew) if crew is not None else Worker)(
            self.lightning_module,
            self.optimizers,
            fit.job.store,
            place.worker_rank,
            place.workers,
            settings,
            {"lightning_async_localsgd": __version__, "max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
            | {"worker_size": self.worker_size},
        )
        worker.on_cut = checkpoints.save_part
        worker.on_progress = self._heed
        return worker

    def _heed(self) -> None:
        if self._callback is not None:
            self._callback.heed()

    def _unfreezes(self, trainer: pl.Trainer) -> bool:
        """Whether parameters that are frozen now may be trained later in this ``fit``."""
        if self.settings.exchange_frozen is not None:
            return self.settings.exchange_frozen
        return any(isinstance(c, BaseFinetuning) for c in trainer.callbacks)  # type: ignore[attr-defined]

    @override
    def configure_ddp(self) -> None:
        """A worker of one device needs no DDP. Several devices wrap the module while their own group is the default."""
        if self.worker_size > 1:
            assert self._groups is not None
            with self._groups.of_worker():
                super().configure_ddp()

    @override
    def on_train_start(self) -> None:
        """Lightning calls this after the hooks of that name of all callbacks and of the module: all meet in those."""
        self.leave_step()
        if self._callback is not None and self._callback.attached:  # in a trial of the learning-rate finder it is not
            self._callback.begin_training()

    @override
    def on_train_end(self) -> None:
        self.meet_again()  # after such a trial

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of this ``fit``; others may be put in their place at any time."""
        return super().optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        DDPStrategy.optimizers.fset(self, optimizers)  # type: ignore[attr-defined]
        if self._fit is None:
            return
        if self._fit.steps is not None:
            self._fit.steps.watch(optimizers)
        if self._fit.worker is not None:
            self._fit.worker.watch(optimizers)

    @override
    def on_validation_end(self) -> None:
        """Lightning calls this after the hooks of that name of all callbacks and of the module."""
        super().on_validation_end()
        if self._callback is not None:
            self._callback.after_validation()

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
        if self._checkpoints is None or self._fit is None or not self._fit.own_in_module:
            return state  # after the last step the module's own: the global ones, or what callbacks have made of them
        return self._checkpoints.put_global(state)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the global model with worker 0's side of the training, and have the others write theirs beside it.

        The checkpoint's ``global_step`` is worker 0's own; the job's count of steps is beside it.
        """
        checkpoint[KEY] = {"job_steps": self.job_steps, "workers": self.workers}
        fit, checkpoints = self._fit, self._checkpoints
        if fit is None or fit.worker is None or fit.phase is Phase.MEETING or fit.place.worker_rank > 0:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        assert checkpoints is not None
        # At the end of the run, or of a worker, nobody is left to ask.
        alone = fit.phase is Phase.FINISHED or fit.failed
        resumable, local = "optimizer_states" in checkpoint, _is_local(filepath)
        with fit.worker.paused():
            if resumable and local and not alone:
                checkpoints.save(checkpoint, os.path.abspath(filepath))
                return
            checkpoints.wait_until_written()  # it may be of the same name
            if resumable and fit.worker.saved_state is not None:
                state = fit.worker.saved_state.global_state_dict()
                checkpoint[KEY] |= {"state": state, "fetches": [fit.fetches_state()]}
            super().save_checkpoint(checkpoint, filepath, storage_options)
            if local and self.is_global_zero:
                checkpoints.files.forget(os.path.abspath(filepath))

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint with all workers' sides of it, once those that replace it are whole."""
        if not (self.is_global_zero and _is_local(filepath)):
            super().remove_checkpoint(filepath)
            return
        delete = super().remove_checkpoint
        files = self._checkpoints.files if self._checkpoints is not None else CheckpointFiles(delete)
        files.remove(os.path.abspath(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if self._fit is not None and self._fit.phase is not Phase.MEETING:
            raise MisconfigurationException(
                "A checkpoint cannot be loaded while workers train. The learning-rate finder does so: run it at the "
                "start of `fit` alone, in `on_fit_start`, or with `Tuner(trainer).lr_find(model)` before."
            )
        if not self._fitting or self._fit is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        restoring = Restoring(self.place, super().load_checkpoint, self.broadcast, weights_only)
        checkpoint, resumed = restoring.restore(str(checkpoint_path))
        self._fit.go_on_from(resumed)
        return checkpoint

    @override
    def on_exception(self, exception: BaseException) -> None:
        explain_missing_group(exception)
        if self._fit is not None:
            self._fit.failed = True
            if self._fit.worker is not None:
                self._fit.worker.abort(exception)
        if self._job is not None:
            self._job.fail(exception)

    @staticmethod
    def _end(fit: Fit, callback: WorkerCallback) -> None:
        if fit.goes_on and fit.phase is Phase.MEETING and not fit.failed:
            # Its epochs were over in the checkpoint, so that Lightning did not train at all: the others need it still.
            callback.take_part()
        if fit.failed:
            return
        if fit.phase is Phase.MEETING:
            meet_before_training(fit.job, trains=False)
        elif fit.phase is Phase.FINISHED:
            FinalModule(fit.job).attach(fit.trainer)

    @override
    def teardown(self) -> None:
        fit, checkpoints = self._fit, self._checkpoints
        if fit is not None:
            try:
                if self._callback is not None:
                    self._detach(fit, self._callback)
            finally:
                if fit.steps is not None:
                    fit.steps.close()
                self._summary, self._steps_made = fit.summary, fit.steps_after_fit
                self._fit = self._checkpoints = None
        if self._loaders is not None:
            self._loaders.close()
            self._loaders = None
        self.end_groups()
        super().teardown()
        if checkpoints is not None:
            checkpoints.wait_until_written()

    def _detach(self, fit: Fit, callback: WorkerCallback) -> None:
        try:
            self._end(fit, callback)
        finally:
            callback.detach()
            if self._global_checkpoints is not None:
                self._global_checkpoints.detach()
            self._callback = self._global_checkpoints = None


_KNOWN_ARGUMENTS = names_of(AsyncLocalSGDStrategy, DDPStrategy, DistributedDataParallel) - {
    *("module", "device_ids")  # which Lightning gives
}


def _is_local(path: Any) -> bool:
    """Whether the other workers' sides can be written beside it."""
    return "://" not in str(path)


def _check_callbacks(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse what a callback would do while workers train and could not do alike on all."""
    averages = any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
    if averages and trainer.max_epochs != -1 and StochasticWeightAveraging.pl_module_contains_batch_norm(module):
        raise MisconfigurationException(
            "`StochasticWeightAveraging` makes an epoch without training for the statistics of BatchNorm layers, when "
            "the run is over here. Use the callback `WeightAveraging`, which averages them too."
        )


def _check_finders(trainer: pl.Trainer) -> None:
    """Refuse the search for a batch size, before its own refusal, which says no way out."""
    if any(isinstance(c, BatchSizeFinder) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "A batch size is found by failing with others, which workers of a job cannot do together. Find it before, "
            "with a trainer of one device without this strategy: `Tuner(L.Trainer(devices=1)).scale_batch_size(model)`."
        )

"""The seam with Lightning: worker-scoped process world, setup, optimizer steps, teardown."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import _update_dataloader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_async_localsgd.callbacks import WorkerCallback
from lightning_async_localsgd.checkpointing import (
    KEY,
    PART_KEYS,
    Checkpoints,
    find_whole,
    new_id,
    read_part,
    write_part,
)
from lightning_async_localsgd.codecs import Codec
from lightning_async_localsgd.data import ShardSampler
from lightning_async_localsgd.membership import StaticJob, join_job
from lightning_async_localsgd.outer import OuterOptimizerFactory
from lightning_async_localsgd.pace import Pace
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.version import __version__
from lightning_async_localsgd.worker import RunSummary, Worker

__all__ = ["AsyncLocalSGDStrategy"]


class AsyncLocalSGDStrategy(DDPStrategy):
    """Trains any LightningModule with asynchronous Local-SGD: one worker per device, each at its own pace.

    Workers train on their own copies of the model. A background thread per worker exchanges pseudo-gradients, and every
    worker applies the same outer updates in the same order to its copy of the global parameters, so that all copies
    stay bit-identical. After ``fit`` the module of every process holds the final global parameters, and ``summary``
    tells how the run went.

    Example::

        trainer = L.Trainer(devices=4, max_steps=20_000, strategy=AsyncLocalSGDStrategy(local_steps=50))
        trainer.fit(model, datamodule)
        print(trainer.strategy.summary)

    Args:
        local_steps: H, local steps per round of the fastest worker.
        outer_optimizer: makes the outer optimizer from the global parameters, for instance
            ``functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)``; None:
            ``DelayedNesterov(lr=0.7, momentum=0.9)``.
        pace: ``"dylu"`` (slow workers make fewer steps per round, so that all rounds take the same time), ``"fixed"``
            (H for everyone), or an object with ``steps(speeds, local_steps)`` and ``tolerance``.
        grace_period: seconds that an exchange waits for workers who are about to finish their round as well (with
            ``overlap``, at least two of their steps or a tenth of their round, for nobody waits meanwhile).
        quorum: deltas to wait for before the outer state moves. 1: every delta is an outer update as it comes. More:
            the mean of the deltas at hand is one. The number of workers: synchronous DiLoCo.
        overlap: keep training while a delta is in flight, and add what was learned meanwhile to the new global
            parameters. False: wait for them, as in the paper.
        budget: ``"shared"``: all workers together make ``max_steps`` times workers local steps, the fast ones more of
            them. ``"per_worker"``: each worker makes ``max_steps``.
        worker_size: consecutive ranks that form one worker; 1 is the only size so far.
        codec: how deltas are written on the wire: ``"fp32"``, ``"bf16"`` or a codec object.
        outer_device: where the global state lives: ``"cpu"`` or a device of the worker.
        timeout: how long a worker may take to answer before the others give up with an error that names it.
        validate_global: in ``fit`` worker 0 alone validates, the global parameters on the whole validation set, while
            the others train on; they are told the metrics. False: each worker validates its own parameters.
        **kwargs: further arguments of Lightning's ``DDPStrategy``, such as ``cluster_environment``,
            ``checkpoint_io`` or ``process_group_backend`` (of the group used outside ``fit``).

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Liu et al. 2024, Asynchronous Local-SGD Training for Language Modeling (arXiv 2401.09135).
    """

    strategy_name = "async_localsgd"

    def __init__(
        self,
        local_steps: int = 50,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(timeout=timeout, **kwargs)
        if worker_size != 1:
            raise ValueError(f"`worker_size={worker_size}` is not supported: each worker is one device. Leave it at 1.")
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
        )
        self.validate_global = validate_global
        self.checkpoints = Checkpoints(super().remove_checkpoint)
        self.worker: Worker | None = None
        """This process' worker, during ``fit``."""
        self.summary: RunSummary | None = None
        """The last finished run in numbers."""
        self._job: StaticJob | None = None
        self._callback: WorkerCallback | None = None
        self._optimizer_stepped = False
        self._steps_before_fit: int | None = None
        self._failed = False
        self._goes_on = False  # this fit has begun from a checkpoint
        self._saved_tensors: dict[str, Tensor] = {}  # what the checkpoint that is being written holds
        self._resumed: dict[str, Any] | None = None  # what `fit` is to go on from
        self._out_of_step = False  # workers train, each at its own pace

    # ---- the process world ------------------------------------------------------------------------------------------

    @property
    def _fitting(self) -> bool:
        module = self.lightning_module
        return module is not None and module._trainer is not None and module.trainer.state.fn == TrainerFn.FITTING

    @override
    def setup_distributed(self) -> None:
        """Meet the other processes. In ``fit`` there is no default process group, so that nothing can block on them."""
        reset_seed()
        self.set_world_ranks()
        self.settings.check_workers(self.world_size)
        if dist.is_initialized():
            raise MisconfigurationException(
                "A default process group exists already, and metrics would be reduced over it while workers are out of "
                "step. Call `torch.distributed.destroy_process_group()` before this."
            )
        assert self.cluster_environment is not None
        os.environ["MASTER_ADDR"] = self.cluster_environment.main_address
        os.environ["MASTER_PORT"] = str(self.cluster_environment.main_port)
        self._job = join_job(self.global_rank, self.world_size, self.settings.timeout)
        store = self._job.next_stage()
        if not self._fitting:
            self._process_group_backend = self._get_process_group_backend()
            dist.init_process_group(
                self._process_group_backend,
                store=store,
                rank=self.global_rank,
                world_size=self.world_size,
                timeout=self.settings.timeout,
                device_id=self.root_device if self.root_device.type == "cuda" else None,
            )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """In ``fit`` Lightning leaves every loader whole; :meth:`process_dataloader` shards the one for training."""
        if self._fitting:
            return {"num_replicas": 1, "rank": 0}
        return super().distributed_sampler_kwargs

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Put shard sampling under the user's map-style training loader."""
        if not self._fitting or not isinstance(dataloader, DataLoader):
            return dataloader
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        # With a batch sampler of the user's own, that is where Lightning puts the sampler.
        sampler = getattr(dataloader.batch_sampler, "sampler", dataloader.sampler)
        overfitting = trainer.overfit_batches > 0  # type: ignore[attr-defined]
        if not trainer.training or overfitting:
            return dataloader
        # Lightning has just put a sampler over all of the data under it, unless the user asked for their own.
        if not isinstance(sampler, DistributedSampler) or sampler.num_replicas != 1:
            return dataloader
        shards = ShardSampler(sampler, self.world_size, self.global_rank, self._current_shard)
        return _update_dataloader(dataloader, shards)

    def _current_shard(self) -> int:
        return self.worker.shard if self.worker is not None else self.global_rank

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Job-wide, except while workers train: then it is this worker's alone."""
        if self._meeting:
            assert self._job is not None
            self._job.barrier()
        else:
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Job-wide, except while workers train. In ``fit`` ``obj`` must be made of what JSON can say."""
        if self._meeting:
            assert self._job is not None
            return self._job.broadcast(obj, src)
        return super().broadcast(obj, src)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._fitting else super().reduce_boolean_decision(decision, all)

    @property
    def _meeting(self) -> bool:
        """Whether all processes go through the same calls: in ``fit`` from its start to the first training step.

        Then worker 0 validates alone, also for the sanity check before.
        """
        if not self._fitting or self._job is None or self._out_of_step:
            return False
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        return not (self.validate_global and (trainer.sanity_checking or trainer.validating))

    # ---- fit --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert self._job is not None and self.lightning_module is not None
        self.summary = None
        self.worker = Worker(
            self.lightning_module,
            self.optimizers,
            self._job.store,
            self.global_rank,
            self.world_size,
            self.settings,
            {"lightning_async_localsgd": __version__, "max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs},
        )
        scheduler_steps = 0
        if self._resumed is not None:
            same_workers = "worker" in self._resumed
            self.worker.load_global_state_dict(self._resumed["state"], same_workers)
            if same_workers:
                self.worker.load_local_state_dict(self._resumed["worker"])
                scheduler_steps = self._resumed["scheduler_steps"]
        self._goes_on = self._resumed is not None
        self._resumed = None
        self.worker.on_cut = self._save_part
        # Books of this run: what an earlier one that failed has left unfinished holds up nothing.
        self.checkpoints = Checkpoints(super().remove_checkpoint, self.world_size)
        self._callback = WorkerCallback(self, trainer, scheduler_steps)

    @override
    def configure_ddp(self) -> None:
        """A worker of one device needs no DDP."""

    def begin_training(self, max_steps: int | None) -> None:
        """Start the worker; from here on processes are out of step."""
        assert self.worker is not None
        self._out_of_step = True
        self.worker.start(max_steps)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._optimizer_stepped = True
        return output

    def steps_before_fit(self, trainer: pl.Trainer) -> int:
        """Steps of the job before this ``fit``: in an earlier one, or as the checkpoint says.

        A checkpoint of another strategy has no such count; there ``global_step`` is the same on every worker.
        """
        if self._steps_before_fit is None:
            self._steps_before_fit = trainer.global_step
        return self._steps_before_fit

    @property
    def job_steps(self) -> int:
        """Steps of the job so far: local steps of all workers over their number."""
        in_this_fit = self.worker.job_steps if self.worker is not None and self._out_of_step else 0
        return (self._steps_before_fit or 0) + in_this_fit

    def take_optimizer_stepped(self) -> bool:
        """Whether an optimizer has stepped since the last call: then the batch was a local step."""
        stepped, self._optimizer_stepped = self._optimizer_stepped, False
        return stepped

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What checkpoints hold: during ``fit`` the global parameters, not this worker's own."""
        state = super().lightning_module_state_dict()
        if self.worker is None or not self._out_of_step:
            return state
        assert self.lightning_module is not None
        self._saved_tensors = self.worker.global_tensors()
        for shared, aliases in _aliases(self.lightning_module).items():
            if shared in self._saved_tensors:
                state.update({name: self._saved_tensors[shared] for name in aliases if name in state})
        return state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the global model with worker 0's side of the training, and have the others write theirs beside it.

        The checkpoint's ``global_step`` is worker 0's own; the job's count of steps is beside it.
        """
        checkpoint[KEY] = {"job_steps": self.job_steps, "workers": self.world_size}
        if self.worker is None or not self._out_of_step or not self.is_global_zero:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        alone = self.summary is not None or self._failed  # at the end of the run, or of a worker, nobody is left to ask
        resumable = "optimizer_states" in checkpoint
        with self.worker.paused():
            if resumable and not alone and _is_local(filepath):
                self._save_with_others(checkpoint, os.path.abspath(filepath))
                return
            if resumable:
                checkpoint[KEY]["state"] = self.worker.global_state_dict()
            super().save_checkpoint(checkpoint, filepath, storage_options)
            if _is_local(filepath):
                self.checkpoints.forget(os.path.abspath(filepath))

    def _save_with_others(self, checkpoint: dict[str, Any], path: str) -> None:
        assert self.worker is not None and self._callback is not None
        checkpoint_id = new_id()
        with self.worker.cut({"id": checkpoint_id, "path": path}):
            for name, tensor in self.worker.global_tensors().items():  # an update may have come since they were taken
                self._saved_tensors[name].copy_(tensor)
            state = self.worker.global_state_dict()
            state["global"]["tensors"] = dict(self._saved_tensors)  # those of "state_dict": they are written once
            checkpoint[KEY] |= {
                "id": checkpoint_id,
                "job_steps": self.job_steps,
                "steps_before_fit": self._steps_before_fit or 0,
                "state": state,
                "worker": self.worker.local_state_dict(),
                "scheduler_steps": self._callback.scheduler_steps,
            }
        io = self.checkpoint_io  # all is to be written when this returns, also with one that writes in the background
        io = io.checkpoint_io if isinstance(io, AsyncCheckpointIO) and io.checkpoint_io is not None else io
        with self.checkpoints.write(path, checkpoint_id) as leader:
            io.save_checkpoint(checkpoint, leader)
        self.checkpoints.part_written(checkpoint_id, 0)

    def _save_part(self, what: dict[str, Any]) -> None:
        """This worker's side of the checkpoint that worker 0 writes."""
        assert self.worker is not None and self.lightning_module is not None and self._callback is not None
        part = {"worker": self.worker.local_state_dict(), "scheduler_steps": self._callback.scheduler_steps}
        trainer = self.lightning_module.trainer
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        precision = type(trainer.precision_plugin).__qualname__
        own = {key: checkpoint[key] for key in (*PART_KEYS, precision) if key in checkpoint}
        write_part(what["path"], what["id"], self.global_rank, part | {"checkpoint": own})
        self.worker.send({"saved": what["id"]})

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint with all workers' sides of it, once those that replace it are whole."""
        if self.is_global_zero and _is_local(filepath):
            self.checkpoints.remove(os.path.abspath(filepath))
        else:
            super().remove_checkpoint(filepath)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if not self._fitting:
            return checkpoint
        self._resumed = None
        self._steps_before_fit = checkpoint.get(KEY, {}).get("job_steps")
        if "state" in checkpoint.get(KEY, {}):
            checkpoint = self._load_own_side(checkpoint, str(checkpoint_path), weights_only)
        return checkpoint

    def _load_own_side(self, checkpoint: dict[str, Any], path: str, weights_only: bool | None) -> dict[str, Any]:
        """Put this worker's side of a checkpoint in the place of worker 0's."""
        # Worker 0 says what is there, for all: others may see a shared folder later, or not at all.
        whole = find_whole(path, checkpoint[KEY].get("id"))
        leader, folder = self.broadcast([str(whole.path), str(whole.folder)] if whole is not None else ["", ""])
        if leader and leader != os.path.realpath(path):
            rank_zero_warn(
                f"The checkpoint {path} is not whole: the job ended before every worker had written its side. Training "
                "goes on from the one that it was to replace."
            )
            checkpoint = super().load_checkpoint(leader, weights_only)
        entry = checkpoint[KEY]
        if "id" not in entry:
            reason = "was written when the other workers had left"
        elif not leader:
            reason = "does not have every worker's side"
        elif entry["workers"] != self.world_size:
            reason = f"was written by {entry['workers']} workers, and there are {self.world_size} now"
        else:
            self._resumed = entry
            self._steps_before_fit = entry["steps_before_fit"]  # the worker's own counts of that fit go on
            if self.global_rank > 0:
                part = read_part(Path(folder), self.global_rank, weights_only)
                own = part.pop("checkpoint")
                # What watches worker 0's metrics goes on as on worker 0.
                own["lr_schedulers"] = [
                    theirs if "num_bad_epochs" in theirs else ours
                    for theirs, ours in zip(checkpoint["lr_schedulers"], own["lr_schedulers"], strict=True)
                ]
                checkpoint |= own
                self._resumed = entry | part
            return checkpoint
        rank_zero_warn(
            f"The checkpoint {path} {reason}. Training goes on from its global parameters and outer state: inner "
            "optimizers start as worker 0's was, and what had been learned since each worker's last push is lost."
        )
        self._resumed = {"state": entry["state"]}
        self._steps_before_fit = entry["job_steps"]
        return checkpoint

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.worker is not None:
            self.worker.abort(exception)

    def stop_asking(self) -> None:
        """The run has failed: a checkpoint that is written now is worker 0's alone."""
        self._failed = True

    def _end(self, callback: WorkerCallback) -> None:
        if self._goes_on and not self._out_of_step and not self._failed:
            # Its epochs were over in the checkpoint, so that Lightning did not train at all: the others need it still.
            callback.take_part()
        if self.summary is not None and self.validate_global:
            assert self._job is not None
            callback.share_decisions(self._job)

    @override
    def teardown(self) -> None:
        if self._callback is not None:
            try:
                self._end(self._callback)
            finally:
                self._callback.detach()
                self._callback = None
        if self._out_of_step:
            self._steps_before_fit = self.job_steps
        self.worker = None
        self._job = None
        self._out_of_step = False
        self._saved_tensors = {}
        self._failed = False
        self._optimizer_stepped = False
        if dist.is_initialized():
            dist.destroy_process_group()
        super().teardown()


def _is_local(path: Any) -> bool:
    """Whether the other workers' sides can be written beside it."""
    return "://" not in str(path)


def _aliases(module: torch.nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter and buffer, and all names it goes by (tied weights have several)."""
    names: dict[int, list[str]] = {}
    for name, tensor in chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


StrategyRegistry.register(
    AsyncLocalSGDStrategy.strategy_name,
    AsyncLocalSGDStrategy,
    description="Asynchronous Local-SGD: one worker per device, each at its own pace",
)

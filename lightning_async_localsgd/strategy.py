"""The seam with Lightning: worker-scoped process world, setup, optimizer steps, teardown."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import _update_dataloader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_async_localsgd.callbacks import WorkerCallback
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
        self.worker: Worker | None = None
        """This process' worker, during ``fit``."""
        self.summary: RunSummary | None = None
        """The last finished run in numbers."""
        self._job: StaticJob | None = None
        self._callback: WorkerCallback | None = None
        self._optimizer_stepped = False
        self._steps_before_fit: int | None = None
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
        """Whether all processes go through the same calls of ``fit``: from its start to the first training step."""
        return self._fitting and self._job is not None and not self._out_of_step

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
        self._callback = WorkerCallback(self, trainer)

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
        global_tensors = self.worker.global_tensors()
        for shared, aliases in _aliases(self.lightning_module).items():
            if shared in global_tensors:
                state.update({name: global_tensors[shared] for name in aliases if name in state})
        return state

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add the job's count of steps; ``global_step`` is worker 0's own."""
        checkpoint["async_localsgd"] = {"job_steps": self.job_steps}
        if self.worker is None or not self._out_of_step:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        with self.worker.paused():
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._steps_before_fit = checkpoint.get("async_localsgd", {}).get("job_steps")
        return checkpoint

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.worker is not None:
            self.worker.abort(exception)

    @override
    def teardown(self) -> None:
        if self._callback is not None:
            self._callback.detach()
            self._callback = None
        if self._out_of_step:
            self._steps_before_fit = self.job_steps
        self.worker = None
        self._job = None
        self._out_of_step = False
        self._optimizer_stepped = False
        if dist.is_initialized():
            dist.destroy_process_group()
        super().teardown()


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

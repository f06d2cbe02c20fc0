"""The process world of the strategy: places, launching, meeting, and collectives of the job wherever all pass."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store
from typing_extensions import override

from lightning_async_localsgd.errors import AsyncLocalSGDError
from lightning_async_localsgd.internals import current_hook, has_trainer
from lightning_async_localsgd.membership import StaticJob, join_job
from lightning_async_localsgd.membership.address import listening_at
from lightning_async_localsgd.membership.store import connection_to
from lightning_async_localsgd.trainer.fit import Place
from lightning_async_localsgd.trainer.launching import ForkingLauncher, ScriptLauncher, check_start_method
from lightning_async_localsgd.trainer.process_groups import NO_GROUP, Groups
from lightning_async_localsgd.trainer.reading import Reading

__all__ = ["ProcessWorldStrategy", "explain_missing_group"]

_LIBRARIES = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "lightning_async_localsgd.")


class ProcessWorldStrategy(DDPStrategy):
    """The part of the strategy that starts processes, and has them meet.

    From ``setup`` to ``on_train_start``, and from ``on_train_end`` to after ``fit``, all processes go through the same
    hooks: there a collective is of the whole job. In between workers are out of step, and it is of this worker alone;
    a user's call is warned of, once.

    Args:
        worker_size: consecutive ranks that form one worker.
        validate_global: whether worker 0 alone validates in ``fit``.
        **kwargs: arguments of Lightning's ``DDPStrategy``.
    """

    def __init__(self, worker_size: int, validate_global: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if worker_size < 1:
            raise ValueError(f"`worker_size` must be at least 1, got {worker_size}.")
        self.worker_size = worker_size
        self.validate_global = validate_global
        self._job: StaticJob | None = None
        self._groups: Groups | None = None  # in `fit` and after it
        self._reading: Reading | None = None  # in `fit`
        self._training = False  # workers train, each at its own pace
        self._torn_down = False  # the last `fit` is over, except for hooks after the strategy's
        self._run_complete = False  # the last update is made: a process lost from now on fails no other one
        self._told = False  # the warning of a collective of this worker alone was given

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, takes no part in the job."""
        return super().__getstate__() | dict.fromkeys(("_job", "_groups", "_reading"))

    # ---- processes --------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        check_start_method(self._start_method, self.cluster_environment)
        if self._start_method == "popen":
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = ForkingLauncher(self, start_method=self._start_method)

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

    def take_place(self) -> None:
        """Find out the place of this process.

        Raises:
            ValueError: if the processes do not make workers of ``worker_size``.
        """
        reset_seed()
        self.set_world_ranks()
        if self.world_size % self.worker_size != 0:
            raise ValueError(
                f"{self.world_size} processes do not make workers of `worker_size={self.worker_size}`. Start a "
                "multiple of it, or choose another size."
            )

    def meet(self) -> None:
        """Meet the other processes. In ``fit`` several default process groups take turns; see :class:`Groups`.

        Raises:
            MisconfigurationException: if a default process group exists already.
        """
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
        assert self._timeout is not None
        self._job = join_job(self.global_rank, self.world_size, self._timeout, self.worker_size)
        store = self._job.next_stage()
        if not self._fitting:
            self._init_process_group(store, self.global_rank, self.world_size)
        elif self.worker_size > 1:
            own_store = PrefixStore(f"worker{self.place.worker_rank}", store)
            self._init_process_group(own_store, self.place.device_rank, self.worker_size)

    def _init_process_group(self, store: Store, rank: int, size: int) -> None:
        assert self._job is not None
        self._process_group_backend = self._get_process_group_backend()
        with listening_at(self._job.address):
            dist.init_process_group(
                self._process_group_backend,
                store=connection_to(store),
                rank=rank,
                world_size=size,
                timeout=self._job.timeout,
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
    def configure_ddp(self) -> None:
        """A worker of one device needs no DDP. Several devices wrap the module while their own group is the default."""
        if self.worker_size > 1:
            assert self._groups is not None
            with self._groups.of_worker():
                super().configure_ddp()

    # ---- collectives ------------------------------------------------------------------------------------------------

    @property
    def job(self) -> StaticJob:
        """The processes of the job, in ``fit`` and after it."""
        assert self._job is not None
        return self._job

    @property
    def _fitting(self) -> bool:
        module = self.lightning_module
        return module is not None and has_trainer(module) and module.trainer.state.fn == TrainerFn.FITTING

    @property
    def _in_step(self) -> bool:
        """Whether all processes go through the same calls. In a validation within ``fit`` only worker 0 does."""
        return self._fitting and self._job is not None and not self._training and not self._validating_alone

    @property
    def _validating_alone(self) -> bool:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        return self.validate_global and (trainer.sanity_checking or trainer.validating)

    @override
    def barrier(self, name: str | None = None) -> None:
        """Wait for the whole job where all processes pass, elsewhere in ``fit`` for this worker's processes."""
        if not self._in_step:
            self._tell_if_apart("barrier")
            with self._of_worker():
                super().barrier(name)
            return
        try:
            self.job.barrier()
        except AsyncLocalSGDError as error:
            if not (self._run_complete and _is_librarys(sys._getframe(1))):
                raise
            warnings.warn(f"The run is complete, but a process was lost at its end. {error}", stacklevel=2)
        if self._groups is not None and not self._torn_down:
            self._groups.begin_in_step()  # Lightning's first barrier follows `prepare_data`

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast over the same processes as :meth:`barrier`. In ``fit`` nothing is pickled.

        Raises:
            TypeError: in ``fit``, if ``obj`` is not made of numbers, strings, containers, paths and tensors; see
                ``lightning_async_localsgd.membership.as_json``.
        """
        if not self._in_step:
            self._tell_if_apart("broadcast")
            with self._of_worker():
                return super().broadcast(obj, src)
        assert self._job is not None
        return self._job.broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the same processes as :meth:`barrier`; ``self.log(..., sync_dist=True)`` calls it."""
        if not self._in_step:
            self._tell_if_apart("reduce")
            with self._of_worker():
                return super().reduce(tensor, group, reduce_op)
        with self._of_job():
            return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather over the same processes as :meth:`barrier`; ``LightningModule.all_gather`` calls it."""
        if not self._in_step:
            self._tell_if_apart("all_gather", by_user=True)
            with self._of_worker():
                return super().all_gather(tensor, group, sync_grads)
        with self._of_job():
            return super().all_gather(tensor, group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Reduce a decision over the same processes as :meth:`barrier`."""
        self._tell_if_apart("reduce_boolean_decision")
        if not self._fitting:
            return super().reduce_boolean_decision(decision, all)
        voters = self.world_size if self._in_step else self.worker_size
        votes = int(self.reduce(torch.tensor(int(decision), device=self.root_device), reduce_op="sum"))
        return votes == voters if all else votes > 0

    # ---- in step and out of it --------------------------------------------------------------------------------------

    def begin_groups(self, worker: ProcessGroup | None) -> None:
        """Begin a ``fit``."""
        assert self.lightning_module is not None
        self._groups = Groups(self.job, worker)
        self._reading = Reading(self._groups)
        self._reading.watch(self.lightning_module.trainer)
        self._torn_down = self._told = self._run_complete = False

    def leave_step(self) -> None:
        """Begin training: from now on each worker trains at its own pace."""
        assert self._groups is not None
        self._training = True
        self._groups.begin_out_of_step()

    def meet_again(self, run_complete: bool = False) -> None:
        """End training: from now on all processes go through the same calls."""
        assert self._groups is not None
        self._run_complete |= run_complete
        self._training = False
        self._groups.begin_in_step()

    def end_groups(self) -> None:
        """End a stage. After a ``fit`` the job can still be used for collectives."""
        if self._reading is not None:
            assert self.lightning_module is not None
            self._reading.leave(self.lightning_module.trainer)
            self._reading = None
        failed = self._trainer_status in (None, TrainerStatus.INTERRUPTED)
        if self._groups is not None and not failed:
            self._groups.end()
        elif dist.is_initialized():
            dist.destroy_process_group()
        if self._groups is None or failed:
            self._groups = self._job = None
        self._training = False
        self._torn_down = True

    @property
    def _trainer_status(self) -> TrainerStatus | None:
        module = self.lightning_module
        return module.trainer.state.status if module is not None and has_trainer(module) else None

    @contextmanager
    def _of_job(self) -> Iterator[None]:
        assert self._groups is not None
        with self._groups.of_job():
            yield

    @contextmanager
    def _of_worker(self) -> Iterator[None]:
        """In the body the default group is the worker's own, also while training data is made or read."""
        if self._groups is None:
            yield
            return
        with self._groups.of_devices():
            yield

    def _tell_if_apart(self, what: str, by_user: bool = False) -> None:
        """Warn once of a user's call that cannot be job-wide. Lightning's own calls are correct within the worker."""
        if not (self._fitting and self._training) or self._told or self.world_size == self.worker_size:
            return
        if self._validating_alone:  # then only this worker's values are gathered
            return
        if _is_librarys(sys._getframe(2)) and not by_user:
            return
        self._told = True
        assert self.lightning_module is not None
        hook = current_hook(self.lightning_module) or "a hook"
        warnings.warn(
            f"`{what}` was called in `{hook}`, while workers train each at their own pace: it is of this worker alone, "
            "for the others may be anywhere. Call it where all processes pass, from `setup` to `on_train_start` or "
            "from `on_train_end` on. What worker 0 logs in its validation, `trainer.callback_metrics` has on every "
            "worker.",
            stacklevel=3,
        )


def _is_librarys(caller: FrameType) -> bool:
    """Whether a call comes from Lightning or this library, and not from the user's code."""
    return str(caller.f_globals.get("__name__", "")).startswith(_LIBRARIES)


def explain_missing_group(error: BaseException) -> None:
    """Add advice to torch's error about a missing process group."""
    error.args = tuple(
        NO_GROUP if isinstance(arg, str) and arg.startswith("Default process group has not been initialized") else arg
        for arg in error.args
    )

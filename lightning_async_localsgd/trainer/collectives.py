"""Collectives of the strategy in ``fit``: of the whole job wherever all processes pass."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from lightning_async_localsgd.errors import AsyncLocalSGDError
from lightning_async_localsgd.internals import current_hook, has_trainer
from lightning_async_localsgd.membership import StaticJob
from lightning_async_localsgd.trainer.process_groups import NO_GROUP, Groups
from lightning_async_localsgd.trainer.reading import Reading

__all__ = ["CollectiveStrategy", "explain_missing_group"]

_LIBRARIES = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "lightning_async_localsgd.")


class CollectiveStrategy(DDPStrategy):
    """The part of the strategy that has processes meet.

    From ``setup`` to ``on_train_start``, and from ``on_train_end`` to after ``fit``, all processes go through the same
    hooks: there a collective is of the whole job. In between workers are out of step, and it is of this worker alone;
    a user's call is warned of, once.
    """

    worker_size: int
    validate_global: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._job: StaticJob | None = None
        self._groups: Groups | None = None  # in `fit` and after it
        self._reading: Reading | None = None  # in `fit`
        self._training = False  # workers train, each at its own pace
        self._torn_down = False  # the last `fit` is over, but for the hooks that Lightning calls after the strategy's
        self._run_complete = False  # the last update is made: who is lost from now on fails no other one
        self._told = False  # that a collective was of this worker alone

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
        """Whether all processes go through the same calls. In a validation in ``fit`` they do not: it is worker 0's."""
        return self._fitting and self._job is not None and not self._training and not self._validating_alone

    @property
    def _validating_alone(self) -> bool:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        return self.validate_global and (trainer.sanity_checking or trainer.validating)

    @override
    def barrier(self, name: str | None = None) -> None:
        """Of the whole job where all processes pass; elsewhere in ``fit`` of this worker."""
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
            self._groups.begin_in_step()  # Lightning's first barrier comes after `prepare_data`, which waits otherwise

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """As :meth:`barrier`. In ``fit`` nothing is pickled.

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
        """As :meth:`barrier`; ``self.log(..., sync_dist=True)`` calls it."""
        if not self._in_step:
            self._tell_if_apart("reduce")
            with self._of_worker():
                return super().reduce(tensor, group, reduce_op)
        with self._of_job():
            return super().reduce(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """As :meth:`barrier`; ``LightningModule.all_gather`` calls it."""
        if not self._in_step:
            self._tell_if_apart("all_gather", by_user=True)
            with self._of_worker():
                return super().all_gather(tensor, group, sync_grads)
        with self._of_job():
            return super().all_gather(tensor, group, sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """As :meth:`barrier`."""
        self._tell_if_apart("reduce_boolean_decision")
        if not self._fitting:
            return super().reduce_boolean_decision(decision, all)
        voters = self.world_size if self._in_step else self.worker_size
        votes = int(self.reduce(torch.tensor(int(decision), device=self.root_device), reduce_op="sum"))
        return votes == voters if all else votes > 0

    # ---- in step and out of it --------------------------------------------------------------------------------------

    def begin_groups(self, worker: ProcessGroup | None) -> None:
        """At the beginning of a ``fit``."""
        assert self.lightning_module is not None
        self._groups = Groups(self.job, worker)
        self._reading = Reading(self._groups)
        self._reading.watch(self.lightning_module.trainer)
        self._torn_down = self._told = self._run_complete = False

    def leave_step(self) -> None:
        """From here on each worker trains at its own pace."""
        assert self._groups is not None
        self._training = True
        self._groups.begin_out_of_step()

    def meet_again(self, run_complete: bool = False) -> None:
        """From here on all processes go through the same calls."""
        assert self._groups is not None
        self._run_complete |= run_complete
        self._training = False
        self._groups.begin_in_step()

    def end_groups(self) -> None:
        """At the end of a stage; after a ``fit`` the job is still there for collectives."""
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
        """The worker's own group, also while training data is made or read; outside `fit` the default one."""
        if self._groups is None:
            yield
            return
        with self._groups.of_devices():
            yield

    def _tell_if_apart(self, what: str, by_user: bool = False) -> None:
        """Warn once of a user's call that cannot be of the job. Lightning's own are right as they are."""
        if not (self._fitting and self._training) or self._told or self.world_size == self.worker_size:
            return
        if self._validating_alone:  # then all that is gathered is this worker's
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
    """Whether a call comes from Lightning or from here, and not from the user's code."""
    return str(caller.f_globals.get("__name__", "")).startswith(_LIBRARIES)


def explain_missing_group(error: BaseException) -> None:
    """Have torch's error about a missing process group say what to do instead."""
    error.args = tuple(
        NO_GROUP if isinstance(arg, str) and arg.startswith("Default process group has not been initialized") else arg
        for arg in error.args
    )

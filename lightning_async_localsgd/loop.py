"""Plain PyTorch loops as workers of a job: a context manager around a module and its optimizers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.distributed import Store
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_async_localsgd.data.random_state import RandomState, set_random_state
from lightning_async_localsgd.membership import StaticJob, join_job
from lightning_async_localsgd.protocol.messages import Cut, SaveNamed
from lightning_async_localsgd.protocol.rounds import whole_samples
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.settings.advice import warn_of_useless_settings
from lightning_async_localsgd.settings.arguments import check_names, names_of
from lightning_async_localsgd.version import __version__
from lightning_async_localsgd.worker.step_watch import ParameterChanges, StepListener
from lightning_async_localsgd.worker.summary import RunSummary
from lightning_async_localsgd.worker.worker import Worker

__all__ = ["AsyncLocalSGD"]


class AsyncLocalSGD:
    """Trains a module with asynchronous Local-SGD in a loop of the user's own. Every process runs the same code.

    Inside the ``with``, each step of the optimizer is a local step. Its end waits for the other workers and puts the
    final global parameters into the module. An exception inside it also ends the others, with an error that names this
    worker and the exception::

        with AsyncLocalSGD(module, optimizer, max_steps=1000) as job:
            while job.running:
                loss(module, next(batches)).backward()
                optimizer.step()
                optimizer.zero_grad()
        print(job.summary)

    The other processes are found by ``torchrun``'s variables ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
    ``MASTER_PORT``. A default process group is neither needed nor used.

    Args:
        module: the module to train, on its device; for several, an ``nn.ModuleList`` of them. Entering the ``with``
            overwrites its trainable parameters and float buffers with worker 0's.
        *optimizers: all optimizers of the module. With several, the *last* one's steps are counted as local steps: it
            must step once per iteration of the loop.
        max_steps: local steps per worker; with ``budget="shared"`` all workers together make ``max_steps`` times their
            number, the fast ones more of it. None: no limit.
        samples: number of samples of each local step; the initial value of the attribute.
        on_checkpoint: called as ``on_checkpoint(name, state_dict)`` on every worker when worker 0 calls
            :meth:`checkpoint`. It must save or copy the ``state_dict``, which refers to tensors that are trained.
        rank: rank of this process; None: ``RANK`` of the environment.
        size: number of processes; None: ``WORLD_SIZE`` of the environment.
        **settings: fields of :class:`~lightning_async_localsgd.Settings`, as documented in
            :class:`~lightning_async_localsgd.AsyncLocalSGDStrategy`: ``local_steps``, ``outer_optimizer``, ``pace``...

    Raises:
        TypeError: if no optimizer is given, there is no such setting, or ``samples`` is not a number.
        ValueError: if ``samples`` is not a whole number from 0 to 2^32, a setting is outside its range, or an optimizer
            trains parameters that ``module`` does not have.
        RuntimeError: if rank, size or the master's address is neither given nor in the environment.
    """

    def __init__(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        max_steps: int | None = None,
        samples: int = 0,
        on_checkpoint: Callable[[str, dict[str, Any]], None] | None = None,
        rank: int | None = None,
        size: int | None = None,
        **settings: Any,
    ) -> None:
        if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
            raise TypeError("Pass the module and then its optimizers: `AsyncLocalSGD(module, optimizer, ...)`.")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, or None for no limit, got {max_steps}.")
        _check_parameters(module, optimizers)
        check_names(settings, names_of(AsyncLocalSGD, Settings) - {"module"}, "AsyncLocalSGD")
        self.settings = Settings(**settings)
        self.max_steps = max_steps
        self.samples = whole_samples(samples)
        """Number of samples of each local step from now on, for the progress of shards and the summary."""
        self.on_checkpoint = on_checkpoint
        self.rank = int(_environment("RANK")) if rank is None else rank
        self.size = int(_environment("WORLD_SIZE")) if size is None else size
        self.settings.check_workers(self.size)
        self.summary: RunSummary | None = None
        """Summary of the finished run."""
        self._module = module
        self._optimizers = optimizers
        self._job: StaticJob | None = None
        self._worker: Worker | None = None
        self._running = False
        self._steps: _Steps | None = None
        self._stop = False
        self._resumed: Mapping[str, Any] | None = None
        self._steps_before = 0  # steps of the job with an earlier number of workers

    # ---- the run ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            _environment(name)
        resumed, self._resumed = self._resumed, None
        self.summary, self._stop, self._steps_before = None, False, 0
        if self.rank == 0:
            warn_of_useless_settings(self.settings, self.size, self.max_steps)
        self._job = join_job(self.rank, self.size, self.settings.timeout)
        store = self._job.next_stage()
        try:
            self._job.barrier()
            self._begin(store, resumed)
        except BaseException as error:
            self._job.fail(error)
            raise
        return self

    def _begin(self, store: Store, resumed: Mapping[str, Any] | None) -> None:
        """Meet the other workers, and start."""
        self._worker = Worker(
            self._module,
            self._optimizers,
            store,
            self.rank,
            self.size,
            self.settings,
            {
                "lightning_async_localsgd": __version__,
                "max_steps": self.max_steps,
                "on_checkpoint": self.on_checkpoint is not None,
                "resumed": [resumed["name"], resumed["global"]["global"]["version"]] if resumed is not None else None,
            },
        )
        self._worker.on_cut = self._save
        if resumed is not None:
            self._resume(self._worker, resumed)
        self._worker.start(None if self.max_steps is None else max(0, self.max_steps - self._steps_before))
        self._running = not self._worker.budget_spent
        self._steps = _Steps(self._module, self._optimizers, self._count)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._job is not None
        if self._steps is not None:
            self._steps.close()
        worker = self.worker
        try:
            if error is not None:
                worker.abort(error)
                self._job.fail(error)
            else:
                self._finish(worker, self._job)
        finally:
            self._running = False
            self._worker = self._steps = None

    def _finish(self, worker: Worker, job: StaticJob) -> None:
        try:
            self._count_change()
            self.summary = worker.finish(stop=self._stop)
        except BaseException as error:
            job.fail(error)
            raise
        job.leave()

    @property
    def running(self) -> bool:
        """Whether to make another local step. Read it once in each iteration of the loop, before the step.

        An iteration with changed parameters and no counted step is counted here.
        """
        self._count_change()
        return self._running

    def step(self) -> None:
        """Count a local step, for updates made without a call of an optimizer's ``step``; such calls are counted.

        Raises:
            RuntimeError: if the run is over.
            AsyncLocalSGDError: if the exchange has failed, on this worker or another.
        """
        if self._steps is not None:
            self._steps.hear()
        self._count()

    def _count(self) -> None:
        if not self._running:
            raise RuntimeError(
                "The run is over: all local steps of the budget are made, or a worker has asked all to stop. Look at "
                "`job.running` before each step, and leave the `with` when it is False."
            )
        self._running = self.worker.step(self.samples)

    def _count_change(self) -> None:
        """Count what has changed the parameters past the optimizer's ``step``: nothing learned may get lost."""
        if self._steps is not None and self._running:
            self._steps.look_for_change()

    def stop(self) -> None:
        """End the training of all workers: of the others after their current step, of this one now.

        Leaving the loop without this call ends the training of this worker alone.
        """
        self._count_change()
        self._stop = True
        self._running = False

    @property
    def _device(self) -> torch.device:
        return next(self._module.parameters()).device

    @property
    def worker(self) -> Worker:
        """The worker, inside the ``with``.

        Raises:
            RuntimeError: outside the ``with``.
        """
        if self._worker is None:
            raise RuntimeError("The job runs in the body of its `with` alone.")
        return self._worker

    @property
    def job_steps(self) -> int:
        """Steps of the job: local steps of all workers over their number. For learning-rate schedules."""
        return self._steps_before + self.worker.job_steps

    @property
    def shard(self) -> int:
        """The data shard of this worker's current round; there are as many shards as workers."""
        return self.worker.shard

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the body out of this worker's measured speed: for work other than training."""
        with self.worker.paused():
            yield

    @contextmanager
    def global_parameters(self) -> Iterator[None]:
        """In the body the module holds the current global parameters and buffers, for validation or saving."""
        worker = self.worker
        self._count_change()
        with worker.paused():
            worker.swap_in_global()
            try:
                yield
            finally:
                worker.swap_in_local()
                if self._steps is not None:
                    self._steps.settle()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> None:
        """Save the same state of the run on every worker: ``on_checkpoint`` runs here now, there after a step.

        Call this on worker 0, between two local steps. A checkpoint is complete when every worker has saved.

        Args:
            name: the argument of ``on_checkpoint``, at most 1000 characters.

        Raises:
            RuntimeError: on other workers than 0, or without ``on_checkpoint``.
        """
        if self.on_checkpoint is None:
            raise RuntimeError("Pass `on_checkpoint` to `AsyncLocalSGD`, which is to save what it is called with.")
        if self.rank != 0:
            raise RuntimeError("Worker 0 alone asks for a checkpoint: put `if job.rank == 0:` before it.")
        what = SaveNamed(name, self.job_steps)
        with self.worker.paused(), self.worker.cut(what):
            self._save(what)

    def _save(self, what: Cut) -> None:
        assert self.on_checkpoint is not None and isinstance(what, SaveNamed)
        state = {
            "name": what.name,
            "job_steps": what.job_steps,
            "steps_before": self._steps_before,
            "size": self.size,
            "global": self.worker.saved_state.global_state_dict(),
            "worker": self.worker.saved_state.local_state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "settings": self.settings.fingerprint(),
            "random": RandomState(self._device).state_dict(),
        }
        self.on_checkpoint(what.name, state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a checkpoint in the next ``with``. ``max_steps`` includes the steps before the checkpoint.

        The current settings apply. The global random generators are restored if the number of workers is the same.

        Args:
            state_dict: the argument of ``on_checkpoint`` on the worker of this rank. With another number of workers,
                worker 0's on all; inner optimizers then start from the state of worker 0's.
        """
        self._resumed = state_dict

    def _resume(self, worker: Worker, state: Mapping[str, Any]) -> None:
        same_workers = state["size"] == self.size
        worker.saved_state.load_global_state_dict(state["global"], same_workers, state.get("settings"))
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if same_workers:
            worker.saved_state.load_local_state_dict(state["worker"])
            if "random" in state:
                set_random_state(state["random"], self._device)
        self._steps_before = state["steps_before"] if same_workers else state["job_steps"]


class _Steps:
    """Tells the local steps of a loop: those of the last optimizer, and changes of the parameters past all of them.

    Args:
        module: the module that is trained.
        optimizers: its optimizers, until :meth:`close`.
        on_step: called after each local step.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], on_step: Callable[[], None]) -> None:
        self._on_step = on_step
        *others, last = optimizers
        self._listeners = [*(StepListener(o, self.hear) for o in others), StepListener(last, self._after_step)]
        self._changes = ParameterChanges(module)
        self._heard = False  # a step of an optimizer, in this run
        self._seen = False  # a step of an optimizer, since the parameters were settled

    def hear(self, made: bool = True) -> None:
        """An optimizer has stepped."""
        self._heard = self._seen = True

    def _after_step(self, made: bool) -> None:
        self.hear()
        if made:  # else a gradient scaler has had it skipped
            self._on_step()

    def look_for_change(self) -> None:
        """Take a change of the parameters in which no optimizer has stepped for a local step."""
        if not self._seen and self._changes.found(bits=not self._heard):
            self._on_step()
        self.settle()

    def settle(self) -> None:
        """What has changed the parameters until now was no training, or is counted."""
        self._seen = False
        self._changes.settle(bits=not self._heard)

    def close(self) -> None:
        """Leave the optimizers as they were."""
        for listener in reversed(self._listeners):
            listener.close()


def _environment(name: str) -> str:
    if name not in os.environ:
        raise RuntimeError(
            f"`{name}` is not set. Start the script with `torchrun`, or set RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT in every process (`rank` and `size` can be passed as arguments)."
        )
    return os.environ[name]


def _check_parameters(module: nn.Module, optimizers: tuple[Optimizer, ...]) -> None:
    """Refuse optimizers of parameters outside the module: these would not be exchanged."""
    exchanged = {id(parameter) for parameter in module.parameters()}
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            if not all(id(parameter) in exchanged for parameter in group["params"]):
                raise ValueError(
                    f"Optimizer {index} ({type(optimizer).__name__}) trains parameters that the module does not have: "
                    "they would not be exchanged. Pass a module that holds all, for instance "
                    "`nn.ModuleList([generator, discriminator])`."
                )

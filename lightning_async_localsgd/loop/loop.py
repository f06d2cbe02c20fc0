"""Plain PyTorch loops as workers of a job: a context manager around a module and its optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn
from torch.distributed import Store
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_async_localsgd.loop.checkpoints import checkpoint_of, resume
from lightning_async_localsgd.loop.steps import LoopSteps, check_parameters
from lightning_async_localsgd.loop.workers import NoJob, find_rank, make_elastic, make_static, read_environment
from lightning_async_localsgd.membership import StaticJob, join_job
from lightning_async_localsgd.membership.elastic import Lighthouse
from lightning_async_localsgd.protocol.messages import Cut, SaveNamed
from lightning_async_localsgd.protocol.rounds import whole_samples
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.settings.advice import warn_of_useless_settings
from lightning_async_localsgd.settings.arguments import check_names, names_of
from lightning_async_localsgd.worker.base import BaseWorker
from lightning_async_localsgd.worker.elastic import ElasticWorker
from lightning_async_localsgd.worker.summary import RunSummary

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
        lighthouse: where workers that come and go find each other; None: the workers are the processes of the
            environment, from the beginning to the end. With it ``rank`` and ``size`` are not given: see
            docs/ways-in/elastic.md.
        name: the name of this worker among those that come and go, which it keeps after a restart; None:
            ``ASYNC_LOCALSGD_WORKER`` of the environment, or a name of its own.
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
        lighthouse: Lighthouse | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, or None for no limit, got {max_steps}.")
        check_parameters(module, optimizers)
        check_names(settings, names_of(AsyncLocalSGD, Settings) - {"module"}, "AsyncLocalSGD")
        self.settings = Settings(**settings)
        self.max_steps = max_steps
        self.samples = whole_samples(samples)
        """Number of samples of each local step from now on, for the progress of shards and the summary."""
        self.on_checkpoint = on_checkpoint
        self._fingerprint = {"max_steps": max_steps, "on_checkpoint": on_checkpoint is not None}
        self._lighthouse = lighthouse
        self._name = name
        self.rank, self.size = find_rank(lighthouse, rank, size)
        if lighthouse is None:
            self.settings.check_workers(self.size)
        self.summary: RunSummary | None = None
        """Summary of the finished run."""
        self._module = module
        self._optimizers = optimizers
        self._job: StaticJob | NoJob | None = None
        self._worker: BaseWorker | None = None
        self._running = False
        self._steps: LoopSteps | None = None
        self._stop = self._leaves = False
        self._resumed: Mapping[str, Any] | None = None
        self._steps_before = 0  # steps of the job with an earlier number of workers

    # ---- the run ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        resumed, self._resumed = self._resumed, None
        self.summary, self._stop, self._leaves, self._steps_before = None, False, False, 0
        if self._lighthouse is not None:
            return self._enter_elastic(self._lighthouse, resumed)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            read_environment(name)
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

    def _enter_elastic(self, lighthouse: Lighthouse, resumed: Mapping[str, Any] | None) -> Self:
        """Find the workers that are there, and start."""
        module, optimizers, fingerprint = self._module, self._optimizers, self._fingerprint
        worker = make_elastic(module, optimizers, lighthouse, self.settings, self._name, fingerprint, resumed)
        worker.start(self.max_steps)
        self._job, self.rank, self.size = NoJob(), worker.rank, worker.size
        self._train(worker)
        return self

    def _begin(self, store: Store, resumed: Mapping[str, Any] | None) -> None:
        """Meet the other workers, and start."""
        module, optimizers, rank, size = self._module, self._optimizers, self.rank, self.size
        worker = make_static(module, optimizers, store, rank, size, self.settings, self._fingerprint, resumed)
        if resumed is not None:
            self._steps_before = resume(worker, optimizers, resumed, self._module)
        worker.start(None if self.max_steps is None else max(0, self.max_steps - self._steps_before))
        self._train(worker)

    def _train(self, worker: BaseWorker) -> None:
        worker.on_cut = self._save
        self._worker = worker
        self._running = not worker.budget_spent
        self._steps = LoopSteps(self._module, self._optimizers, self._count)

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

    def _finish(self, worker: BaseWorker, job: StaticJob | NoJob) -> None:
        try:
            self._count_change()
            if self._leaves:
                assert isinstance(worker, ElasticWorker)
                self.summary = worker.leave()
            else:
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
        return self._running and not self._leaves

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

    def leave(self) -> None:
        """End this worker's part alone, also from a signal handler: what it has learned goes to the others, who go on.

        Raises:
            RuntimeError: where workers do not come and go.
        """
        if self._lighthouse is None:
            raise RuntimeError(
                "A worker can leave the others alone only with a `lighthouse`; `stop` ends the run of all."
            )
        self._leaves = True

    @property
    def leads(self) -> bool:
        """Whether this worker is the one, now, that validates, logs and saves: of those that are there the first."""
        return self.worker.leads

    @property
    def worker(self) -> BaseWorker:
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
        if not self.leads:
            raise RuntimeError("The first worker alone asks for a checkpoint: put `if job.leads:` before it.")
        self._count_change()
        with self.worker.paused(), self.worker.cut(what := SaveNamed(name, self.job_steps)):
            self._save(what)
        if self._steps is not None:
            self._steps.settle()  # new global parameters may have come, which are no step

    def _save(self, what: Cut) -> None:
        assert self.on_checkpoint is not None and isinstance(what, SaveNamed)
        state = checkpoint_of(self.worker, self._optimizers, what, self._steps_before, self._module)
        self.on_checkpoint(what.name, state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a checkpoint in the next ``with``. ``max_steps`` includes the steps before the checkpoint.

        The current settings apply. The global random generators are restored if the number of workers is the same.

        Args:
            state_dict: the argument of ``on_checkpoint`` on the worker of this rank. With another number of workers,
                worker 0's on all; inner optimizers then start from the state of worker 0's.
        """
        self._resumed = state_dict

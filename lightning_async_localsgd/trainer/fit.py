"""One ``fit`` of a trainer: its processes, its worker, and its phase."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import lightning.pytorch as pl
import torch

from lightning_async_localsgd.membership import StaticJob
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.settings.advice import warn_of_useless_settings
from lightning_async_localsgd.trainer.checkpoints.resumed import Resumed
from lightning_async_localsgd.trainer.fetches import SavedFetches
from lightning_async_localsgd.trainer.meetings import meet_before_training
from lightning_async_localsgd.worker.rank import WorkerRank
from lightning_async_localsgd.worker.step_watch import StepWatch
from lightning_async_localsgd.worker.summary import RunSummary

__all__ = ["Fit", "Phase", "Place", "Position", "Together"]


@dataclass(frozen=True)
class Place:
    """The place of a process in its job."""

    global_rank: int
    world_size: int
    worker_size: int
    """Number of processes of each worker."""

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.world_size // self.worker_size

    @property
    def worker_rank(self) -> int:
        """Rank of the worker of this process."""
        return self.global_rank // self.worker_size

    @property
    def device_rank(self) -> int:
        """Rank of the process within its worker."""
        return self.global_rank % self.worker_size


class Phase(Enum):
    """The phase of a ``fit``."""

    MEETING = "all processes go through the same hooks; no worker trains yet"
    TRAINING = "each worker trains at its own pace, and its module is its own"
    FINISHED = "the last outer update is made, and the module is the global one"


class Position(Protocol):
    """The position of a process in its training, as a checkpoint holds it."""

    @property
    def scheduler_steps(self) -> int:
        """Steps of the job that the learning-rate schedulers have made in this ``fit``."""

    def fetches_state(self) -> dict[str, Any]:
        """The position in the training data."""


class Together(Protocol):
    """The collectives of a strategy, job-wide while all processes go through the same hooks."""

    def leave_step(self) -> None:
        """Begin training: from now on each worker trains at its own pace."""

    def meet_again(self, run_complete: bool = False) -> None:
        """End training: from now on all processes go through the same hooks."""


class Fit:
    """One ``fit``, from the first meeting of its processes to the strategy's teardown.

    Args:
        trainer: the trainer.
        place: the place of this process.
        settings: settings of the run.
        job: the processes.
        device: the device of this process.
        together: the strategy's collectives; called when workers leave step and meet again.
        validate_global: whether worker 0 validates the global model for all.
        same_data: whether workers train on the same data by intention.
        steps_before: steps of the job in earlier fits of the same strategy; None: unknown.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        place: Place,
        settings: Settings,
        job: StaticJob,
        device: torch.device,
        together: Together,
        validate_global: bool = True,
        same_data: bool = False,
        steps_before: int | None = None,
    ) -> None:
        self.trainer = trainer
        self.place = place
        self.settings = settings
        self.job = job
        self.device = device
        self.together = together
        self.validate_global = validate_global
        self.same_data = same_data
        self.phase = Phase.MEETING
        self.failed = False
        """This process has met an error; the phase stays the one in which it did."""
        self.worker: WorkerRank | None = None
        self.steps: StepWatch | None = None
        self.position: Position | None = None
        self.goes_on = False
        """Whether this ``fit`` is resumed from a checkpoint of this strategy."""
        self.saved_fetches: SavedFetches | None = None
        """The position in the training data to restore on this process."""
        self.saved_scheduler_steps = 0
        """Steps of the job counted by the learning-rate schedulers in that checkpoint."""
        self.summary: RunSummary | None = None
        """Summary of the finished run."""
        self._steps_before = steps_before
        self._resumed: Resumed | None = None  # until it is loaded: it holds the tensors of the checkpoint

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or pickle, which takes no part in the job."""
        return vars(self) | dict.fromkeys(("job", "together", "worker", "steps", "position", "_resumed"))

    @property
    def leads(self) -> bool:
        """Whether this is a process of worker 0 and worker 0 validates the global model for all."""
        return self.validate_global and self.place.worker_rank == 0

    @property
    def follows(self) -> bool:
        """Whether this worker leaves validation, and decisions by its metrics, to worker 0."""
        return self.validate_global and self.place.worker_rank > 0

    @property
    def own_in_module(self) -> bool:
        """Whether the module holds this worker's own parameters: from the first training step to the last."""
        return self.phase is Phase.TRAINING

    def go_on_from(self, resumed: Resumed) -> None:
        """Resume from a checkpoint. Call this before the worker is made."""
        self._resumed = resumed
        self._steps_before = resumed.steps_before_fit
        self.goes_on = resumed.state is not None
        self.saved_fetches = resumed.fetches
        self.saved_scheduler_steps = resumed.scheduler_steps

    def set_worker(self, worker: WorkerRank) -> None:
        """Have this worker train, from the checkpoint if there is one."""
        self.worker = worker
        resumed, self._resumed = self._resumed, None
        if resumed is not None and worker.saved_state is not None:
            resumed.load_into(worker.saved_state)

    def begin_training(self, max_steps: int | None, open_end: bool) -> None:
        """Wait for the other processes and start the worker."""
        assert self.worker is not None and self.steps is not None
        meet_before_training(self.job, trains=True)
        self.phase = Phase.TRAINING
        if self.place.global_rank == 0:
            warn_of_useless_settings(self.settings, self.place.workers, max_steps)
        self.worker.start(max_steps, open_end)
        self.steps.restart()  # discards steps of the learning-rate finder

    def finish(self, summary: RunSummary) -> None:
        """End training, after the last outer update."""
        self.summary = summary
        self.phase = Phase.FINISHED

    # ---- steps ------------------------------------------------------------------------------------------------------

    def steps_before_fit(self) -> int:
        """Steps of the job before this ``fit``: in an earlier one, or in the checkpoint.

        A checkpoint of another strategy has no such count. Its ``global_step``, equal on all workers, replaces it.
        """
        if self._steps_before is None:
            self._steps_before = self.trainer.global_step
        return self._steps_before

    @property
    def job_steps(self) -> int:
        """Steps of the job so far: local steps of all workers over their number."""
        trained = self.worker is not None and self.phase is not Phase.MEETING
        return (self._steps_before or 0) + (self.worker.job_steps if trained and self.worker is not None else 0)

    @property
    def steps_after_fit(self) -> int | None:
        """Steps of the job before the next ``fit``; None: unknown."""
        return self._steps_before if self.phase is Phase.MEETING else self.job_steps

    @property
    def scheduler_steps(self) -> int:
        """Steps of the job that the learning-rate schedulers have made in this ``fit``."""
        return self.position.scheduler_steps if self.position is not None else 0

    def fetches_state(self) -> dict[str, Any]:
        """The position of this process in its training data, for a checkpoint."""
        return self.position.fetches_state() if self.position is not None else {}

    def settle_parameters(self) -> None:
        """Ignore changes of the parameters since the last local step: they were no training."""
        if self.steps is not None:
            self.steps.settle()

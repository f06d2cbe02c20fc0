"""What workers of any membership have in common: they count local steps, push deltas, adopt new global parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_async_localsgd.exchange import Adoption, Exchange, Mailbox
from lightning_async_localsgd.protocol.header import Flag
from lightning_async_localsgd.protocol.machine import Reason
from lightning_async_localsgd.protocol.messages import Cut, Message
from lightning_async_localsgd.protocol.progress import OuterUpdate, Progress
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.dropped_deltas import Drops
from lightning_async_localsgd.worker.global_view import GlobalView
from lightning_async_localsgd.worker.local_steps import LocalSteps
from lightning_async_localsgd.worker.model import WorkerModel
from lightning_async_localsgd.worker.round_trip import RoundTrip
from lightning_async_localsgd.worker.saved_state import SavedState
from lightning_async_localsgd.worker.summary import RunSummary

__all__ = ["BaseWorker"]


class BaseWorker(ABC):
    """One replica of a module in a run. The training thread owns the module and this object."""

    def _make_model(self, module: nn.Module, optimizers: Sequence[Optimizer], size: int, settings: Settings) -> None:
        """Make what does not depend on the other workers."""
        self.on_cut: Callable[[Cut], None] | None = None
        """Called on the training thread when the exchange stands still for a checkpoint; see :meth:`cut`."""
        self.on_progress: Callable[[], None] | None = None
        """Called on the training thread after each turn that it waits for: there may be messages to handle."""
        self.settings = settings
        model = self._model = WorkerModel(module, optimizers, size, settings)
        self._replica, self._state = model.replica, model.state
        self._measure_updates = False
        self._exchange: Exchange | None = None  # until the start

    def _take_rank(self, rank: int, size: int) -> None:
        """Be this worker, of so many that the run is planned for."""
        self.rank = rank
        self.size = size
        feedbacks = self._model.feedbacks
        self._rounds = Rounds(rank, size, self.settings)
        self.saved_state = SavedState(rank, size, self.settings, self._rounds, self._replica, self._state, feedbacks)
        """What checkpoints hold of this worker, and what it goes on from."""

    # ---- the run ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def start(self, max_steps: int | None = None, open_end: bool = False) -> None:
        """Start the exchange thread and the first round.

        Args:
            max_steps: local steps per worker; with ``budget="shared"`` all workers together make ``max_steps * size``,
                the fast ones more of it. None: until :meth:`step` is no longer called.
            open_end: ``max_steps`` is only what is expected, of epochs for instance: :meth:`step` does not end the run.
        """

    def _begin(self, mailbox: Mailbox, exchange: Exchange, name: str) -> None:
        """Begin with the first round; the rounds have been started."""
        self._mailbox, self._exchange = mailbox, exchange
        mailbox.measure_updates = self._measure_updates
        self._replica.begin(self._state.flat)
        drops = Drops(name, self._model.layout)
        trip = RoundTrip(self.rank, self.settings, self._rounds, self._replica, mailbox, drops, self._adopted)
        self._global = GlobalView(self._state, self._replica, mailbox, trip)
        self.saved_state.begin(mailbox, exchange, trip)
        self._steps = LocalSteps(self.settings, self._rounds, self._replica, mailbox, trip, self._after_wait)
        self._steps.begin(exchange)

    def step(self, samples: int = 0) -> bool:
        """Count one local step; push, adopt or wait where it is time to. Call it after each step of the optimizer.

        Args:
            samples: samples this worker learned in this step: a whole number from 0 to 2^32.

        Returns:
            Whether to go on training. Once False, call :meth:`finish`.

        Raises:
            TypeError: if ``samples`` is not a number.
            ValueError: if it is not a whole one, or outside its range.
            AsyncLocalSGDError: if the exchange has failed, on this worker or another.
        """
        self._steps.count(samples)
        self._global.handle_cut(self._save)
        return self._steps.go_on()

    def _adopted(self, adoption: Adoption) -> None:  # noqa: B027
        """Called after each adoption; nothing follows here."""

    def _after_wait(self, reason: Reason) -> None:
        self._global.handle_cut(self._save)
        if self.on_progress is not None and reason not in (Reason.ADOPTION, Reason.LAST_ADOPTION):
            self.on_progress()

    def _save(self, what: Cut) -> None:
        if self.on_cut is not None:
            with self.paused():
                self.on_cut(what)

    def finish(self, stop: bool = False) -> RunSummary:
        """End this worker's part: push what it has not pushed, wait for the others, take the final global parameters.

        Args:
            stop: ask all other workers to end their training as well.

        Returns:
            The run in numbers.

        Raises:
            AsyncLocalSGDError: if the exchange fails before the end.
        """
        assert self._exchange is not None
        if stop:
            self._mailbox.flag(Flag.STOP)
        self._steps.finish()
        self._exchange.join(self.settings.timeout.total_seconds())
        self._become_global()
        return self.summary(digest=self._state.digest())

    @abstractmethod
    def _become_global(self) -> None:
        """Put the final global parameters into the module after the run, and give up the connections."""

    def abort(self, error: BaseException) -> None:
        """Leave because of ``error``; the other workers are told and stop too."""
        if self._exchange is not None:
            self._exchange.abort(error)

    def paused(self) -> AbstractContextManager[None]:
        """Do something other than training (validation, a checkpoint) that is not to count in this worker's speed."""
        return self._steps.paused()

    def pause(self) -> None:
        """Begin a pause; see :meth:`paused`. There can be one within another."""
        self._steps.pause()

    def resume(self) -> None:
        """End a pause."""
        self._steps.resume()

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """From now on these are the inner optimizers."""
        self._replica.watch(optimizers)

    # ---- what the run looks like ------------------------------------------------------------------------------------

    @property
    def _progress(self) -> Progress:
        """Shared progress, as of the latest exchange."""
        return self._mailbox.progress if self._exchange is not None else self.saved_state.progress

    @property
    def leads(self) -> bool:
        """Whether this worker is the first of those that are there: it validates, logs and saves."""
        return self.rank == 0

    @property
    def version(self) -> int:
        """Version of the global parameters that this worker has adopted."""
        return self._steps.trip.version if self._exchange is not None else self.saved_state.version

    @property
    def local_steps(self) -> int:
        """Local steps this worker has made in this run."""
        return self._rounds.local_steps

    @property
    def steps_made(self) -> tuple[int, ...]:
        """Local steps of each worker, as far as this one knew with its latest step."""
        return self._steps.steps_made if self._exchange is not None else ()

    @property
    def round(self) -> int:
        """Number of pushes of this worker: without fragments, of rounds."""
        return self._rounds.round

    @property
    def shard(self) -> int:
        """The data shard of this worker's current round: its own at first, then drawn by progress (Eq. 2)."""
        return self._rounds.shard

    @property
    def job_steps(self) -> int:
        """Steps of the job: local steps of all workers over their number, rounded down. Never goes back.

        Between two exchanges the others are taken to advance at their pace. Learning-rate schedules count these.
        """
        return self._rounds.job_steps(self._progress)

    @property
    def budget_spent(self) -> bool:
        """Whether no step is left for this worker, as of the latest exchange: in a run that goes on, at its start."""
        return self._rounds.budget_spent(self._progress)

    @property
    def stop_requested(self) -> bool:
        """Whether some worker has asked all to end their training."""
        return self._progress.stop

    @property
    def speeds(self) -> tuple[float, ...]:
        """Local steps per second of each worker, as of the latest exchange; 0 while unknown."""
        return self._progress.speeds

    @property
    def pace_share(self) -> float:
        """This worker's share of the pace of all, as of the latest exchange."""
        return self._progress.round_steps[self.rank] / sum(self._progress.round_steps)

    @property
    def alignment(self) -> float:
        """Cosine between worker 0's latest delta and the outer momentum, about; known on worker 0 alone, else NaN."""
        return self._mailbox.alignment

    @property
    def exchanged_at(self) -> float:
        """When the latest exchange was, which :meth:`summary` is as of, in seconds of the monotonic clock."""
        return self._mailbox.published_at

    def summary(self, digest: str = "") -> RunSummary:
        """The run in numbers, as of the latest exchange."""
        return RunSummary.of(self._progress, self._steps.blocked_seconds, digest)

    def measure_updates(self) -> None:
        """Compute every outer update's ``norm`` and ``alignment`` from now on, on the exchange thread."""
        self._measure_updates = True
        if self._exchange is not None:
            self._mailbox.measure_updates = True

    def take_updates(self) -> list[OuterUpdate]:
        """The outer updates since the last call, oldest first (at most 4096: older ones are forgotten)."""
        return self._mailbox.take_updates()

    # ---- messages and decisions -------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send a message to all workers, this one included. It comes with the next exchange, which begins now.

        Raises:
            ValueError: if it is longer than a header has room for, about 4 KB.
        """
        self._mailbox.send(message)

    def take_messages(self) -> list[tuple[int, Message]]:
        """Messages since the last call, as pairs of sender and message, in the same order on every worker."""
        return self._mailbox.take_messages()

    def agree(self, decision: bool) -> bool:
        """A decision that all processes of the worker are to make alike: that of its first."""
        return decision

    def gather_from_devices(self) -> list[Tensor]:
        """What the other processes of this worker, if there are any, have to save of their own: bytes of each."""
        return []

    # ---- the global model -------------------------------------------------------------------------------------------

    def global_tensors(self) -> dict[str, Tensor]:
        """Copies of the global parameters and buffers of now, by name, on the CPU."""
        return self._global.tensors()

    def swap_in_global(self, for_cut: bool = False) -> None:
        """Put the global parameters and buffers of now into the module, until :meth:`swap_in_local`.

        Args:
            for_cut: they become those of the next :meth:`cut`.
        """
        self._global.swap_in(for_cut)

    def swap_in_local(self) -> None:
        """Put this worker's own parameters back, bit for bit."""
        self._replica.swap_in_local()

    @property
    def global_swapped_in(self) -> bool:
        """Whether the module holds the global parameters, and this worker its own."""
        return self._replica.global_swapped_in

    def cut(self, what: Cut) -> AbstractContextManager[None]:
        """Have the exchange stand still between two turns, on all workers, so that all can save the same moment.

        On the other workers ``on_cut(what)`` is called at the end of their current step; here the body of the ``with``
        runs at once. Each worker's exchange goes on when its own is done; their training does not wait for it.

        Args:
            what: what the others are to do.
        """
        return self._global.hold(what)

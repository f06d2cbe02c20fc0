"""The face of a worker on each of its processes, whether it takes part in the exchange or mirrors one that does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_async_localsgd.protocol.messages import Cut, Message
from lightning_async_localsgd.protocol.progress import OuterUpdate
from lightning_async_localsgd.worker.saved_state import SavedState
from lightning_async_localsgd.worker.summary import RunSummary

__all__ = ["WorkerRank"]


class WorkerRank(Protocol):
    """One process of a worker.

    The first process takes part in the exchange: it is a :class:`~lightning_async_localsgd.worker.worker.Worker`. The
    others are each a :class:`~lightning_async_localsgd.worker.device_group.OtherRank`, and make the same calls at
    the same steps.
    """

    # ---- the run ----------------------------------------------------------------------------------------------------

    def start(self, max_steps: int | None = None, open_end: bool = False) -> None:
        """See :meth:`Worker.start`."""

    def step(self, samples: int = 0) -> bool:
        """See :meth:`Worker.step`."""

    def finish(self, stop: bool = False) -> RunSummary:
        """See :meth:`Worker.finish`."""

    def abort(self, error: BaseException) -> None:
        """Leave because of ``error``; the others notice."""

    def paused(self) -> AbstractContextManager[None]:
        """Do something other than training that is not to count in the worker's speed."""

    def pause(self) -> None:
        """Begin a pause; see :meth:`paused`."""

    def resume(self) -> None:
        """End a pause."""

    def watch(self, optimizers: Sequence[Optimizer]) -> None:
        """From now on these are the inner optimizers."""

    # ---- what the run looks like ------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """The worker."""

    @property
    def local_steps(self) -> int:
        """Local steps the worker has made in this run."""

    @property
    def steps_made(self) -> tuple[int, ...]:
        """Local steps of each worker, as far as this one knew with its latest step; empty where it is not known."""

    @property
    def job_steps(self) -> int:
        """Steps of the job: local steps of all workers over their number, rounded down."""

    @property
    def budget_spent(self) -> bool:
        """Whether no step is left for the worker."""

    @property
    def stop_requested(self) -> bool:
        """Whether some worker has asked all to end their training."""

    @property
    def shard(self) -> int:
        """The data shard of the worker's current round."""

    @property
    def pace_share(self) -> float:
        """The worker's share of the pace of all."""

    @property
    def speeds(self) -> tuple[float, ...]:
        """Local steps per second of each worker; 0 while unknown."""

    @property
    def alignment(self) -> float:
        """Cosine between worker 0's latest delta and the outer momentum; NaN but on worker 0's first process."""

    @property
    def exchanged_at(self) -> float:
        """When the latest exchange was, in seconds of the monotonic clock; NaN but on the first process."""

    def summary(self) -> RunSummary:
        """The run in numbers, as of the latest exchange."""

    def measure_updates(self) -> None:
        """Have every outer update's ``norm`` and ``alignment`` computed from now on."""

    def take_updates(self) -> list[OuterUpdate]:
        """The outer updates since the last call, oldest first."""

    # ---- messages and decisions -------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send a JSON object to all workers, once: the first process does."""

    def take_messages(self) -> list[tuple[int, Message]]:
        """Messages since the last call, as pairs of sender and message."""

    def agree(self, decision: bool) -> bool:
        """A decision that all processes of the worker are to make alike: that of its first."""

    # ---- the global model -------------------------------------------------------------------------------------------

    @property
    def saved_state(self) -> SavedState | None:
        """What checkpoints hold of the worker; None on another process than its first."""

    def gather_from_devices(self) -> list[Tensor]:
        """What the other processes of the worker have to save of their own: on its first one the bytes of each."""

    def cut(self, what: Cut) -> AbstractContextManager[None]:
        """See :meth:`Worker.cut`. All processes of the worker call it."""

    def global_tensors(self) -> dict[str, Tensor]:
        """Copies of the global parameters and buffers of now, by name; empty on another process than the first."""

    def swap_in_global(self, for_cut: bool = False) -> None:
        """See :meth:`Worker.swap_in_global`. All processes of the worker call it."""

    def swap_in_local(self) -> None:
        """Put the worker's own parameters back, bit for bit."""

    @property
    def global_swapped_in(self) -> bool:
        """Whether the module holds the global parameters."""

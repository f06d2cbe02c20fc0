"""The machine: which action a worker takes next. It takes events and returns actions, and does nothing itself.

The training thread of a real worker and the virtual clock of the simulator execute the same actions::

    action = machine.after_step(progress, in_flight, wanted)
    while True:
        match action:
            case Extend():  ...; action = machine.after_extension(progress)
            case Push():    ...; action = machine.after_push(progress)
            case Wait():    ...; action = machine.after_wait(progress, in_flight)
            case Train():   make another step
            case Finish():  action = machine.finish(in_flight)
            case Done():    the run is over
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.protocol.rounds import Rounds

__all__ = ["Action", "Done", "Extend", "Finish", "Machine", "Push", "Reason", "Train", "Wait"]


class Reason(Enum):
    """What a worker waits for."""

    ADOPTION = "the exchange of its round"
    LAST_ADOPTION = "the exchange of its round, before it ends"
    BUDGET = "a share of the budget that others leave"
    END = "the other workers, to end"


@dataclass(frozen=True)
class Train:
    """Make another local step."""


@dataclass(frozen=True)
class Push:
    """End the round and hand its delta to the exchange."""

    last: bool = False
    """Whether the worker makes no other round. Without local steps since the push before, it says so alone."""


@dataclass(frozen=True)
class Extend:
    """Add the steps since the push to the round that it ended, if the exchange has not begun with it."""

    most: int
    """The most local steps that the pushed round may have for that."""


@dataclass(frozen=True)
class Wait:
    """Wait for the next turn of the exchange that brings an adoption or news of the others."""

    reason: Reason


@dataclass(frozen=True)
class Finish:
    """Make no other step. The worker ends its part with :meth:`Machine.finish`."""


@dataclass(frozen=True)
class Done:
    """The run is over for all workers."""


Action = Train | Push | Extend | Wait | Finish | Done


class Machine:
    """Decides on a worker's next action.

    Args:
        rounds: the worker's rounds. Whoever executes the actions counts steps and ends rounds there.
        overlap: whether the worker trains while its delta is exchanged.
    """

    def __init__(self, rounds: Rounds, overlap: bool) -> None:
        self._rounds = rounds
        self._overlap = overlap
        self._reason: Reason | None = None

    def begin(self, progress: Progress) -> Action:
        """Before the first step, or when a worker joins."""
        return self._go_on(progress)

    def after_step(self, progress: Progress, in_flight: bool, wanted: bool) -> Action:
        """After a local step, which has been counted.

        Args:
            progress: shared progress of now.
            in_flight: whether the adoption of the worker's last push is still to come.
            wanted: whether a turn is being held open for this worker's push.
        """
        if in_flight:
            return Extend(self._rounds.most_to_extend(progress))
        if self._rounds.push_is_due(progress, wanted):
            return Push()
        return self._go_on(progress)

    def after_extension(self, progress: Progress) -> Action:
        """After a push was extended, or could not be any more."""
        return self._go_on(progress)

    def after_push(self, progress: Progress) -> Action:
        """After a push."""
        if self._reason is Reason.END:
            return self._wait_for_end(progress)
        if self._reason is Reason.LAST_ADOPTION:
            return Wait(Reason.LAST_ADOPTION)
        return self._go_on(progress) if self._overlap else self._wait(Reason.ADOPTION)

    def after_wait(self, progress: Progress, in_flight: bool) -> Action:
        """After a turn that the worker has waited for.

        Args:
            progress: shared progress of now.
            in_flight: whether the adoption of the worker's last push is still to come.
        """
        if self._reason is Reason.END:
            return self._wait_for_end(progress)
        if self._reason is Reason.LAST_ADOPTION:
            return self.finish(in_flight)
        if self._reason is Reason.ADOPTION and in_flight:
            return Wait(Reason.ADOPTION)
        return self._go_on(progress)

    def finish(self, in_flight: bool) -> Action:
        """End the worker's part: what it has not pushed is its last push, then it waits for the others.

        With fragments it is as many pushes, one after the other.

        Args:
            in_flight: whether the adoption of the worker's last push is still to come.
        """
        if in_flight:
            return self._wait(Reason.LAST_ADOPTION)
        if self._rounds.unsent_fragments > 1:
            self._reason = Reason.LAST_ADOPTION
            return Push()
        self._reason = Reason.END
        return Push(last=True)

    def _go_on(self, progress: Progress) -> Action:
        if self._rounds.over(progress):
            return Finish()
        if self._rounds.has_step(progress):
            self._reason = None
            return Train()
        return self._wait(Reason.BUDGET) if self._rounds.may_get_more else Finish()

    def _wait_for_end(self, progress: Progress) -> Action:
        return Done() if progress.over else Wait(Reason.END)

    def _wait(self, reason: Reason) -> Wait:
        self._reason = reason
        return Wait(reason)

"""The local steps of a worker: executes what the protocol's machine decides after each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_async_localsgd.exchange import Exchange, Mailbox
from lightning_async_localsgd.protocol.header import Flag
from lightning_async_localsgd.protocol.machine import Action, Extend, Machine, Push, Reason, Train, Wait
from lightning_async_localsgd.protocol.progress import Progress
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.replica import Replica
from lightning_async_localsgd.worker.round_trip import RoundTrip

__all__ = ["LocalSteps"]


class LocalSteps:
    """Counts a worker's local steps and executes the machine's actions between them. The training thread owns it.

    Args:
        settings: settings of the run.
        rounds: the worker's rounds.
        replica: its replica.
        mailbox: where its training thread and its exchange thread meet.
        trip: pushes and adopts.
        after_wait: called after each turn that the worker has waited for, with the reason of the wait.
    """

    def __init__(
        self,
        settings: Settings,
        rounds: Rounds,
        replica: Replica,
        mailbox: Mailbox,
        trip: RoundTrip,
        after_wait: Callable[[Reason], None],
    ) -> None:
        self.trip = trip
        """Pushes and adopts."""
        self.steps_made = rounds.steps_made(mailbox.progress)
        """Local steps of each worker, as far as this one knew with its latest step."""
        self.blocked_seconds = 0.0
        """Time that the training thread has spent between two local steps."""
        self._machine = Machine(rounds, settings.overlap)
        self._overlap = settings.overlap
        self._rounds = rounds
        self._replica = replica
        self._mailbox = mailbox
        self._after_wait = after_wait
        self._decided_on = mailbox.progress
        self._pauses = 0

    def begin(self, exchange: Exchange) -> None:
        """Start the exchange thread, and with it the first local step."""
        progress = self._mailbox.progress
        self.trip.report()  # a turn may open before this worker's first step has ended
        self._replica.synchronize()  # from here on the other thread moves the global state
        exchange.start()
        if not self._overlap:
            while self._replica.in_flight:  # what a run that goes on had pushed
                self._wait(Reason.ADOPTION, progress)
        self.trip.begin_round()
        self.trip.end_step()
        self.trip.speed_meter.resume()

    def count(self, samples: int) -> None:
        """Count a local step that has ended, and adopt what has come meanwhile.

        Args:
            samples: samples learned in it.
        """
        self.trip.speed_meter.step()
        self.trip.end_step()
        self._rounds.count(samples)
        self._replica.stepped(first=self._rounds.round_steps == 1)
        self.trip.adopt_if_ready()

    def go_on(self) -> bool:
        """Do what is to be done until the next local step; returns whether there is one."""
        self.trip.report()
        running = self._execute(self._decide_after_step)
        while running and not self._may_begin_step():
            running = self._execute(self._decide_after_wait)
        self.steps_made = self._rounds.steps_made(self._mailbox.progress)
        if self._rounds.round_steps == 0:  # what came between two rounds was waiting
            self.trip.begin_round()
        seconds = self.trip.speed_meter.resume()
        if running:  # else it was the end of the run that this worker waited for, not its next step
            self.blocked_seconds += seconds
        return running

    def _may_begin_step(self) -> bool:
        """Whether another step may be made now.

        While a turn is under way a worker makes no more steps than it has reserved: the rest of its share may go to
        others. That is more than a turn takes, as a rule; else its outcome is waited for.
        """
        while True:
            progress = self._mailbox.progress
            self.trip.report()  # by this progress
            if not self._mailbox.standing.may_begin_step():
                self._wait(Reason.BUDGET, self._decided_on)
                return False
            if self._mailbox.progress is progress:  # else its turn knew an earlier report
                return not self._rounds.over(progress) and self._rounds.has_step(progress)

    def finish(self) -> None:
        """Make the last push, and wait for the others."""
        self._execute(lambda _: self._machine.finish(self._replica.in_flight))
        progress = self._mailbox.progress
        self._rounds.final_job_steps(progress)
        self.steps_made = progress.steps

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something in the body that does not count in the worker's speed."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> None:
        """Begin a pause; see :meth:`paused`. There can be one within another."""
        self._pauses += 1
        self._mailbox.flag(Flag.PAUSED)
        self.trip.speed_meter.pause()

    def resume(self) -> None:
        """End a pause."""
        self._pauses -= 1
        if self._pauses == 0:
            self._mailbox.unflag(Flag.PAUSED)
            self.trip.speed_meter.resume()

    def _execute(self, decide: Callable[[Progress], Action]) -> bool:
        """Execute the machine's actions up to the next step; returns whether there is one."""
        idle = False
        while True:
            progress = self._decided_on = self._mailbox.progress
            action = decide(progress)
            if isinstance(action, Push):
                self.trip.push_last() if action.last else self.trip.push()
                decide = self._machine.after_push
            elif isinstance(action, Extend):
                self.trip.extend_push(action.most)
                decide = self._machine.after_extension
            elif isinstance(action, Wait):
                if action.reason is Reason.BUDGET and not idle:
                    idle = True
                    self._mailbox.flag(Flag.IDLE)
                    self._mailbox.announce()
                self._wait(action.reason, progress)
                decide = self._decide_after_wait
            else:
                if idle and isinstance(action, Train):
                    self._mailbox.unflag(Flag.IDLE)
                return isinstance(action, Train)

    def _decide_after_step(self, progress: Progress) -> Action:
        return self._machine.after_step(progress, self._replica.in_flight, self._mailbox.push_wanted)

    def _decide_after_wait(self, progress: Progress) -> Action:
        return self._machine.after_wait(progress, self._replica.in_flight)

    def _wait(self, reason: Reason, than: Progress) -> None:
        """Wait for an adoption, or for newer progress than this."""
        if reason in (Reason.ADOPTION, Reason.LAST_ADOPTION):
            self.trip.wait_for_adoption()
        else:
            self._mailbox.wait_for_progress(than)
            self.trip.adopt_if_ready()
        self._after_wait(reason)

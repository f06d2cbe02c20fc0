"""A lane of the timeline: the rounds of one virtual worker, under the virtual clock.

The decisions are those of a real run: the worker's :class:`~lightning_async_localsgd.protocol.rounds.Rounds` and its
:class:`~lightning_async_localsgd.protocol.machine.Machine`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lightning_async_localsgd.protocol.header import Flag
from lightning_async_localsgd.protocol.machine import Action, Done, Extend, Machine, Reason, Train, Wait
from lightning_async_localsgd.protocol.machine import Push as PushAction
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.protocol.speed_meter import SpeedMeter
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.clock import Phase, VirtualClock
from lightning_async_localsgd.simulation.devices import VirtualWorker
from lightning_async_localsgd.simulation.exchange import VirtualExchange
from lightning_async_localsgd.simulation.interfaces import Replicas
from lightning_async_localsgd.simulation.mailbox import Push, VirtualMailbox

__all__ = ["Lane"]


class Lane:
    """A virtual worker on the timeline: what the training thread of a real one does.

    Args:
        rank: the worker.
        worker: its device, and when it is there.
        rounds: its rounds, which have been started.
        settings: settings of the run.
        mailbox: where it meets the exchange.
        exchange: the exchange.
        replicas: what learns.
        clock: the virtual clock.
        all_steps: tells the local steps that all workers have made.
        seed: seed of its device.
    """

    def __init__(
        self,
        rank: int,
        worker: VirtualWorker,
        rounds: Rounds,
        settings: Settings,
        mailbox: VirtualMailbox,
        exchange: VirtualExchange,
        replicas: Replicas,
        clock: VirtualClock,
        all_steps: Callable[[], int],
        seed: int,
    ) -> None:
        self.rank = rank
        self.worker = worker
        self.rounds = rounds
        self.busy_seconds = 0.0
        """Virtual time it has trained."""
        self.waits: list[tuple[float, float]] = []
        """From when until when it has waited for the exchange or the others, before its last step."""
        self.waits_for: Reason | None = None
        """What it waits for now."""
        self.present = False
        self._machine = Machine(rounds, settings.overlap)
        self._mailbox = mailbox
        self._exchange = exchange
        self._replicas = replicas
        self._clock = clock
        self._all_steps = all_steps
        self._chance = random.Random(f"{seed} {rank}")
        self._speed_meter = SpeedMeter(settings.round_length(None).longest, lambda: clock.now)
        self._start_versions = [0] * settings.fragments  # of the global parameters that its progress is counted from
        self._round_began = 0.0
        self._step_ended = 0.0
        self._waits_since = 0.0
        self._present_seconds = 0.0  # until it left

    @property
    def waiting_seconds(self) -> float:
        """Virtual time of its waits that are over."""
        return sum(until - since for since, until in self.waits)

    def present_until(self, now: float) -> float:
        """Virtual time it has been there."""
        return self._present_seconds + (now - self.worker.joins if self.present else 0.0)

    def waited_until(self, now: float) -> float:
        """Virtual time of all waits, with the one that goes on."""
        return self.waiting_seconds + (now - self._waits_since if self.waits_for is not None else 0.0)

    # ---- what the timeline calls ------------------------------------------------------------------------------------

    def join(self) -> None:
        """Begin with the first step."""
        self.present = True
        self._start_versions = list(self._exchange.join(self.rank))
        self.rounds.join(self._exchange.progress)
        self._round_began = self._clock.now
        self._replicas.join(self.rank)
        self._report()
        self._execute(self._machine.begin(self._exchange.progress))

    def leave(self) -> None:
        """Be gone, in the middle of a step or a wait."""
        self.present = False
        self._present_seconds = self._clock.now - self.worker.joins
        self.waits_for = None
        self._exchange.leave(self.rank)

    def wake(self) -> None:
        """After a turn: go on, if what the worker waits for has come."""
        if not self.present or self.waits_for is None:
            return  # its step ends in its own time
        self._adopt_if_ready()
        self._execute(self._machine.after_wait(self._exchange.progress, self._mailbox.in_flight))

    # ---- steps ------------------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        if self.waits_for is not None:  # at the end of the run it would not have waited for its next step
            self.waits.append((self._waits_since, self._clock.now))
            self.waits_for = None
            if self.rounds.round_steps == 0:
                self._round_began = self._clock.now
        seconds = self.worker.device.step_seconds(self._clock.now, self._chance)
        self._replicas.step(self.rank, self.rounds, self._exchange.progress)
        self._speed_meter.resume()
        self._clock.after(seconds, Phase.DEVICES, self._end_step, seconds)

    def _end_step(self, seconds: float) -> None:
        if not self.present:
            return
        self.busy_seconds += seconds
        self._step_ended = self._clock.now
        self._speed_meter.step()
        self.rounds.count(samples=0)  # samples are counted when the step is really made, at the latest by the push
        self._adopt_if_ready()
        self._report()
        wanted = self._exchange.wants_push(self.rank)
        self._execute(self._machine.after_step(self._exchange.progress, self._mailbox.in_flight, wanted))

    def _report(self) -> None:
        """Tell the exchange how the worker stands."""
        progress, mailbox = self._exchange.progress, self._mailbox
        mailbox.steps = self.rounds.local_steps
        mailbox.speed = self._speed_meter.speed(progress.round_steps[self.rank])
        mailbox.reserve = self.rounds.reserve(progress, mailbox.speed)
        mailbox.hold_open_seconds = self.rounds.hold_open_seconds(progress, mailbox.speed)

    def _execute(self, action: Action) -> None:
        """Execute the machine's actions until one takes time."""
        while not isinstance(action, (Train, Wait, Done)):
            if isinstance(action, PushAction):
                self._push_last() if action.last else self._push()
                action = self._machine.after_push(self._exchange.progress)
            elif isinstance(action, Extend):
                self._extend_push(action.most)
                action = self._machine.after_extension(self._exchange.progress)
            else:
                action = self._machine.finish(self._mailbox.in_flight)
        if isinstance(action, Train):
            self._mailbox.flags &= ~Flag.IDLE
            self._report()  # by the progress of now
            if self._mailbox.steps < self._mailbox.limit:
                self._begin_step()
            else:
                self._wait(Reason.BUDGET)
        elif isinstance(action, Wait):
            idle = action.reason is Reason.BUDGET and self.waits_for is not Reason.BUDGET
            self._wait(action.reason)
            if idle:
                self._mailbox.flags |= Flag.IDLE
                self._exchange.announce(self.rank)

    def _wait(self, reason: Reason) -> None:
        if self.waits_for is None:
            self._waits_since = self._clock.now
        self.waits_for = reason
        if self._mailbox.push is not None:  # it does not train on until the exchange has it
            self._exchange.announce(self.rank)

    # ---- rounds -----------------------------------------------------------------------------------------------------

    def _push_last(self) -> None:
        self._wait(Reason.END)
        if self.rounds.unsent_fragments > 0:
            self._push(Flag.FINAL)
        else:
            self._mailbox.flags |= Flag.FINAL
            self._exchange.announce(self.rank)

    def _push(self, flags: Flag = Flag.NONE, extended: Push | None = None) -> None:
        progress = self._exchange.progress
        fragment = self.rounds.due_fragment(progress)
        learned = self._replicas.push(self.rank, fragment)
        self.rounds.round_samples += learned.samples
        begin = self._round_began if extended is None else extended.begin
        shard = None if extended is None else extended.round.shard
        seconds = self._step_ended - begin if self.rounds.round_steps > 0 else 0.0
        self._mailbox.push = Push(
            round=self.rounds.end_round(progress, seconds, fragment, self._start_versions[fragment], shard),
            loss=learned.loss + (extended.loss if extended is not None else 0.0),
            begin=begin,
            end=self._step_ended,
            all_steps=self._all_steps(),
        )
        self._round_began = self._clock.now
        self._report()
        self._mailbox.flags |= flags
        if Flag.FINAL in flags:
            self._exchange.announce(self.rank)
        else:
            self._exchange.pushed(self.rank)

    def _extend_push(self, most: int) -> None:
        push = self._mailbox.push
        if push is None or push.round.steps > most:
            return
        self.rounds.reopen(push.round)
        self._push(extended=push)

    def _adopt_if_ready(self) -> None:
        adoption, self._mailbox.adoption = self._mailbox.adoption, None
        if adoption is None:
            return
        self._replicas.adopt(self.rank, adoption.restart)
        if adoption.restart:
            self.rounds.restart()
            self._start_versions = list(adoption.versions)
        self._start_versions[adoption.fragment] = adoption.versions[adoption.fragment]

"""The round trip: how a worker's rounds go to the exchange as pushes and come back as adoptions."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.profiler import record_function

from lightning_async_localsgd.exchange import Adoption, Mailbox, Push
from lightning_async_localsgd.protocol.header import Flag
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.protocol.speed_meter import SpeedMeter
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.worker.dropped_deltas import Drops
from lightning_async_localsgd.worker.replica import Replica

__all__ = ["RoundTrip"]


class RoundTrip:
    """Pushes a worker's rounds and adopts the global parameters that come back. The training thread owns it.

    Args:
        rank: the worker.
        settings: settings of the run.
        rounds: its rounds.
        replica: its replica.
        mailbox: where its training thread and its exchange thread meet.
        drops: tells of deltas that were dropped.
        adopted: called after each adoption.
    """

    def __init__(
        self,
        rank: int,
        settings: Settings,
        rounds: Rounds,
        replica: Replica,
        mailbox: Mailbox,
        drops: Drops,
        adopted: Callable[[Adoption], None],
    ) -> None:
        self.version = 0
        """Version of the global parameters that the worker has adopted."""
        self.start_versions = [0] * settings.fragments
        """Version of each fragment's global parameters that its progress is counted from."""
        self.speed_meter = SpeedMeter(settings.round_length(None).longest)
        """Measures the worker's speed."""
        self._rank = rank
        self._rounds = rounds
        self._replica = replica
        self._mailbox = mailbox
        self._drops = drops
        self._adopted = adopted
        self._round_began = self._step_ended = 0.0

    def begin_round(self) -> None:
        """The first local step of a round begins: what was before it was waiting."""
        self._round_began = time.monotonic()

    def end_step(self) -> None:
        """A local step has ended."""
        self._step_ended = time.monotonic()

    def report(self) -> None:
        """Tell the exchange thread how this worker stands."""
        progress = self._mailbox.progress
        speed = self.speed_meter.speed(progress.round_steps[self._rank])
        rounds, standing = self._rounds, self._mailbox.standing
        hold_open_seconds, reserve = rounds.hold_open_seconds(progress, speed), rounds.reserve(progress, speed)
        standing.report(rounds.local_steps, speed, hold_open_seconds, reserve)

    # ---- pushes -----------------------------------------------------------------------------------------------------

    def push(self, flags: Flag = Flag.NONE, shard: int | None = None) -> None:
        """Hand the local parameters of now to the exchange thread; training may go on at once.

        Args:
            flags: to raise with it.
            shard: the round's shard, if that of the next one has been drawn already; None: the current one.
        """
        with record_function("async_localsgd::push"):
            progress, rounds = self._mailbox.progress, self._rounds
            fragment = rounds.due_fragment(progress)
            written = self._replica.write(fragment, rounds.unsent[fragment])
            seconds = self._step_ended - self._round_began if rounds.round_steps > 0 else 0.0
            ended = rounds.end_round(progress, seconds, fragment, self.start_versions[fragment], shard)
            self.report()
            self._mailbox.push(Push(*written, ended), flags)

    def push_last(self) -> None:
        """Push what has not been pushed, and tell that no other push will come."""
        if self._rounds.unsent_fragments > 0:
            self.push(Flag.FINAL)
        else:
            self._mailbox.flag(Flag.FINAL)
            self._mailbox.announce()

    def extend_push(self, most: int) -> None:
        """Add the steps made since the push to the round it ended, while its turn is held open for others.

        Args:
            most: the most local steps that the pushed round may have for that.
        """
        push = self._mailbox.take_back(most)
        if push is None:
            return
        self._replica.take_back(push.base)
        self._rounds.reopen(push.round)
        self._round_began -= push.round.seconds
        self.push(shard=push.round.shard)  # samples of the next one may be on their way already

    # ---- adoptions --------------------------------------------------------------------------------------------------

    def adopt_if_ready(self) -> None:
        """Take over the global parameters that have come, if any have."""
        adoption = self._mailbox.collect()
        if adoption is not None:
            self._adopt(adoption)

    def wait_for_adoption(self) -> None:
        """Wait until the last push comes back, and take over the global parameters that come with it."""
        adoption = self._mailbox.wait_for_adoption()
        if adoption is not None:
            self._adopt(adoption)

    def _adopt(self, adoption: Adoption) -> None:
        """Take over new global parameters, keeping what was learned since the push."""
        self._drops.look(adoption.fragment, adoption.unsendable)
        self._replica.adopt(adoption, self._rounds.round_steps)
        if adoption.restart:
            self._rounds.restart()
            self.start_versions = list(adoption.versions)
        self.version = adoption.version
        self.start_versions[adoption.fragment] = adoption.versions[adoption.fragment]
        self._adopted(adoption)

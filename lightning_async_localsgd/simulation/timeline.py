"""The timeline: rounds of virtual workers and turns of their exchange, under a virtual clock.

The decisions are those of a real run: each worker's :class:`~lightning_async_localsgd.protocol.rounds.Rounds` and the
:class:`~lightning_async_localsgd.protocol.ledger.Ledger`. This file says when things happen, in the order of the real
worker and exchange thread; what is learned meanwhile is the business of :class:`Replicas`.
"""

from __future__ import annotations

import heapq
import random
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import count
from typing import Any, NamedTuple, Protocol

from lightning_async_localsgd.protocol.budget import Budget
from lightning_async_localsgd.protocol.header import HEADER_BYTES, Flag, Header
from lightning_async_localsgd.protocol.ledger import Ledger, LedgerState
from lightning_async_localsgd.protocol.machine import Action, Done, Extend, Machine, Push, Reason, Train, Wait
from lightning_async_localsgd.protocol.progress import OuterUpdate, Progress
from lightning_async_localsgd.protocol.rounds import Rounds
from lightning_async_localsgd.protocol.speed_meter import Stopwatch
from lightning_async_localsgd.protocol.turn import PushedRound, add_round, may_push
from lightning_async_localsgd.settings import Settings
from lightning_async_localsgd.simulation.devices import VirtualWorker
from lightning_async_localsgd.simulation.network import Network

__all__ = ["FinishedRound", "Lane", "Learned", "Observer", "Replicas", "Timeline"]


class Learned(NamedTuple):
    """What a worker's local steps since its last push have seen."""

    samples: int
    loss: float
    """Sum of the training losses of those steps."""


class Replicas(Protocol):
    """What the workers of a timeline learn. The timeline tells in which order."""

    def join(self, worker: int) -> None:
        """A worker begins, with the global parameters of now."""

    def step(self, worker: int, rounds: Rounds, progress: Progress) -> None:
        """A worker begins a local step, knowing this; it will end before anything else is said of this worker."""

    def push(self, worker: int) -> Learned:
        """A worker's round ends. Said again before the delta has been traded, it ends here instead."""

    def finite(self, worker: int) -> bool:
        """Whether the delta of the round that a worker has pushed can be sent."""

    def trade(self, groups: Sequence[Sequence[Header]]) -> Iterator[Sequence[Header]]:
        """Bring the sum of one group's deltas after the other into the state's pseudo-gradient; yields whose."""

    def publish(self, workers: Sequence[int]) -> None:
        """These workers are to adopt the global parameters of now, when they get to it."""

    def adopt(self, worker: int, restart: bool) -> None:
        """A worker adopts what was published for it; what it has learned since its push stays, unless it restarts."""


@dataclass(frozen=True)
class FinishedRound:
    """A round whose delta has come to the others."""

    worker: int
    round: int
    begin: float
    """Virtual time in seconds."""
    end: float
    adopted: float
    """Virtual time at which the new global parameters were there."""
    local_steps: int
    all_steps: int
    """Local steps that all workers had made at its end."""
    loss: float
    """Mean training loss."""


class Observer(Protocol):
    """Who is told what happens."""

    def updated(self, time: float, updates: Sequence[OuterUpdate]) -> None:
        """Deltas were applied."""

    def finished(self, rounds: Sequence[FinishedRound]) -> None:
        """Rounds are over. The global state stands still meanwhile."""


class _Phase(IntEnum):
    """What comes first of what happens at the same time."""

    DEVICES = 0
    EXCHANGE = 1


@dataclass(frozen=True)
class _Push:
    """A finished round on its way."""

    round: PushedRound
    loss: float
    begin: float
    end: float
    all_steps: int


@dataclass(frozen=True)
class _Adoption:
    """New global parameters that a worker has not taken over yet."""

    version: int
    restart: bool


class Lane:
    """A virtual worker on the timeline: what its training thread, its mailbox and its pending delta are in a real run.

    Args:
        rank: the worker.
        worker: its device, and when it is there.
        size: number of workers.
        settings: settings of the run.
        seed: seed of its device.
        clock: tells the virtual time in seconds.
    """

    def __init__(
        self, rank: int, worker: VirtualWorker, size: int, settings: Settings, seed: int, clock: Callable[[], float]
    ) -> None:
        self.rank = rank
        self.worker = worker
        self.rounds = Rounds(rank, size, settings)
        self.machine = Machine(self.rounds, settings.overlap)
        self.busy_seconds = 0.0
        """Virtual time it has trained."""
        self.waits: list[tuple[float, float]] = []
        """From when until when it has waited for the exchange or the others, before its last step."""
        self.present = False
        self.present_seconds = 0.0  # until it left
        self.bytes_sent = 0
        self.bytes_received = 0
        self.stopwatch = Stopwatch(settings.round_length(None).longest, clock)
        self.exchange = (0.0, 0.0)  # seconds that its latest exchange took, and kept its processor busy
        self.chance = random.Random(f"{seed} {rank}")
        self.version = 0  # of the global parameters that it has adopted
        self.steps = 0  # as its next header tells
        self.speed = 0.0
        self.patience = 0.0
        self.flags = Flag.FINAL  # who is not there has nothing more to say
        self.began = 0.0  # the first step of the current round
        self.ended = 0.0  # its latest step
        self.news = False
        self.push: _Push | None = None  # not taken by the exchange yet
        self.pending: _Push | None = None  # taken, not applied yet
        self.adoption: _Adoption | None = None
        self.wait: Reason | None = None
        self.waits_since = 0.0

    @property
    def in_flight(self) -> bool:
        """Whether its last push has not come back yet."""
        return self.push is not None or self.pending is not None or self.adoption is not None

    @property
    def waiting_seconds(self) -> float:
        """Virtual time of its waits that are over."""
        return sum(until - since for since, until in self.waits)

    def present_until(self, now: float) -> float:
        """Virtual time it has been there."""
        return self.present_seconds + (now - self.worker.joins if self.present else 0.0)

    def waited_until(self, now: float) -> float:
        """Virtual time of all waits, with the one that goes on."""
        return self.waiting_seconds + (now - self.waits_since if self.wait is not None else 0.0)


class Timeline:
    """Lets virtual workers make their rounds, in virtual time.

    Args:
        workers: the workers.
        max_steps: local steps per worker, on average with a shared budget.
        settings: settings of the run.
        state: what outer updates move.
        replicas: what learns.
        observer: who is told.
        network: what the exchange goes over.
        elements: of a delta.
        element_bytes: bytes of an element on the wire.
        update_seconds: virtual time that an outer update takes each worker's exchange thread.
        turn_seconds: virtual time that a turn with deltas takes each exchange thread for its own.
        seed: seed of what is random in the devices.
    """

    def __init__(
        self,
        workers: Sequence[VirtualWorker],
        max_steps: int,
        settings: Settings,
        state: LedgerState,
        replicas: Replicas,
        observer: Observer,
        network: Network,
        elements: int,
        element_bytes: int,
        update_seconds: float = 0.0,
        turn_seconds: float = 0.0,
        seed: int = 0,
    ) -> None:
        size = len(workers)
        self.now = 0.0
        """Virtual time in seconds."""
        self.over = False
        self.local_steps = 0
        """Local steps of all workers so far."""
        self.lanes = [Lane(w, worker, size, settings, seed, lambda: self.now) for w, worker in enumerate(workers)]
        self._settings = settings
        self._state = state
        self._replicas = replicas
        self._observer = observer
        self._network = network
        self._elements = elements
        self._element_bytes = element_bytes
        self._update_seconds = update_seconds
        self._turn_seconds = turn_seconds
        budget = Budget(max_steps, size, settings.shares_budget(size))
        start = Progress.at_start(size, settings.round_length(max_steps).first())
        late = [worker.joins > 0 for worker in workers]
        self.progress = replace(start, caps=budget.caps(start.steps, start.round_steps, final=late))
        """Shared progress after the latest turn."""
        self._ledger = Ledger(state, settings, budget, self.progress)
        self._events: list[tuple[float, _Phase, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._turn = 0
        self._turn_open = False
        self._awaited: set[int] = set()  # who has not let go of the open turn yet
        self._held_by: set[int] = set()  # who holds it open for its push
        self._headers: dict[int, Header] = {}  # of this turn
        self._present: list[int] = []  # who is there, in order of rank
        self._to_come = size
        for lane in self.lanes:
            lane.rounds.start(self.progress, max_steps)
            self._at(lane.worker.joins, _Phase.DEVICES, self._join, lane)
            if lane.worker.leaves < float("inf"):
                self._at(lane.worker.leaves, _Phase.DEVICES, self._leave, lane)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Let time go on until the run is over, and apply what was learned.

        Args:
            until: asked before each event; the run stands still while it is true.

        Raises:
            RuntimeError: if all wait for each other, which no run should.
        """
        while not self.over and not until():
            if not self._events:
                waits = {lane.rank: lane.wait.value for lane in self.lanes if lane.wait is not None}
                raise RuntimeError(f"Nothing happens any more, though the run is not over; workers wait for {waits}.")
            self.now, _, _, happen, arguments = heapq.heappop(self._events)
            happen(*arguments)

    def _at(self, time: float, phase: _Phase, happen: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (time, phase, next(self._order), happen, arguments))

    # ---- a worker's training thread ---------------------------------------------------------------------------------

    def _join(self, lane: Lane) -> None:
        lane.present = True
        insort(self._present, lane.rank)
        self._to_come -= 1
        lane.flags = Flag.NONE
        lane.version = self._state.version
        lane.rounds.join(self.progress)
        lane.began = self.now
        self._replicas.join(lane.rank)
        self._state.begin_rounds([lane.rank])
        self._report(lane)
        self._execute(lane, lane.machine.begin(self.progress))

    def _leave(self, lane: Lane) -> None:
        lane.present = False
        self._present.remove(lane.rank)
        lane.present_seconds = self.now - lane.worker.joins
        lane.flags = Flag.FINAL
        lane.speed = 0.0
        lane.push = lane.wait = None
        if lane.rank not in self._headers:
            lane.pending = None
        self._tell(lane)

    def _begin_step(self, lane: Lane) -> None:
        if lane.wait is not None:  # at the end of the run it would not have waited for its next step
            lane.waits.append((lane.waits_since, self.now))
            lane.wait = None
            if lane.rounds.round_steps == 0:
                lane.began = self.now
        seconds = lane.worker.device.step_seconds(self.now, lane.chance)
        self._replicas.step(lane.rank, lane.rounds, self.progress)
        lane.stopwatch.resume()
        lane.flags |= Flag.STEPPING
        self._at(self.now + seconds, _Phase.DEVICES, self._end_step, lane, seconds)

    def _end_step(self, lane: Lane, seconds: float) -> None:
        if not lane.present:
            return
        lane.busy_seconds += seconds
        lane.ended = self.now
        lane.flags &= ~Flag.STEPPING
        lane.stopwatch.step()
        self.local_steps += 1
        lane.rounds.count(samples=0)  # samples are counted when the step is really made, at the latest by the push
        self._adopt_if_ready(lane)
        self._report(lane)
        wanted = lane.rank in self._held_by
        self._execute(lane, lane.machine.after_step(self.progress, lane.in_flight, wanted))

    def _report(self, lane: Lane) -> None:
        lane.steps = lane.rounds.local_steps
        lane.speed = lane.stopwatch.speed(self.progress.round_steps[lane.rank])
        lane.patience = lane.rounds.patience(self.progress, lane.speed)

    def _execute(self, lane: Lane, action: Action) -> None:
        """Execute the machine's actions until one takes time."""
        while not isinstance(action, (Train, Wait, Done)):
            if isinstance(action, Push):
                self._push_last(lane) if action.last else self._push(lane)
                action = lane.machine.after_push(self.progress)
            elif isinstance(action, Extend):
                self._extend_push(lane, action.most)
                action = lane.machine.after_extension(self.progress)
            else:
                action = lane.machine.finish(lane.in_flight)
        if isinstance(action, Train):
            lane.flags &= ~Flag.IDLE
            self._begin_step(lane)
        elif isinstance(action, Wait):
            idle = action.reason is Reason.BUDGET and lane.wait is not Reason.BUDGET
            self._wait(lane, action.reason)
            if idle:
                lane.flags |= Flag.IDLE
                self._tell(lane)

    def _push_last(self, lane: Lane) -> None:
        self._wait(lane, Reason.END)
        if lane.rounds.round_steps > 0:
            self._push(lane, Flag.FINAL)
        else:
            lane.flags |= Flag.FINAL
            self._tell(lane)

    def _push(self, lane: Lane, flags: Flag = Flag.NONE, extended: _Push | None = None) -> None:
        learned = self._replicas.push(lane.rank)
        lane.rounds.round_samples += learned.samples
        begin = lane.began if extended is None else extended.begin
        shard = None if extended is None else extended.round.shard
        lane.push = _Push(
            round=lane.rounds.end_round(self.progress, lane.ended - begin, lane.version, shard),
            loss=learned.loss + (extended.loss if extended is not None else 0.0),
            begin=begin,
            end=lane.ended,
            all_steps=self.local_steps,
        )
        lane.began = self.now
        self._report(lane)
        lane.flags |= flags
        self._tell(lane)

    def _extend_push(self, lane: Lane, most: int) -> None:
        push = lane.push
        if push is None or push.round.steps > most:
            return
        lane.rounds.reopen(push.round)
        self._push(lane, extended=push)

    def _adopt_if_ready(self, lane: Lane) -> None:
        if lane.adoption is None:
            return
        self._replicas.adopt(lane.rank, lane.adoption.restart)
        if lane.adoption.restart:
            lane.rounds.restart()
        lane.version = lane.adoption.version
        lane.adoption = None

    def _wait(self, lane: Lane, wait: Reason) -> None:
        if lane.wait is None:
            lane.waits_since = self.now
        lane.wait = wait

    def _wake(self, lane: Lane) -> None:
        """After a turn: go on, if what the worker waits for has come."""
        if lane.wait is None:
            return  # its step ends in its own time
        self._adopt_if_ready(lane)
        self._execute(lane, lane.machine.after_wait(self.progress, lane.in_flight))

    # ---- the exchange -----------------------------------------------------------------------------------------------

    def _tell(self, lane: Lane) -> None:
        """There is news from a worker: it opens a turn, or holds one open no longer."""
        lane.news = True
        if not self._turn_open:
            self._turn_open = True
            self._at(self.now, _Phase.EXCHANGE, self._open_turn)
        elif lane.rank in self._held_by:
            self._release(lane, self._turn)

    def _open_turn(self) -> None:
        """The bell rings: at once for who opens the turn, a trip later for the others."""
        self._awaited = {lane.rank for lane in self.lanes}
        trip = self._network.trip(self._present)
        for lane in self.lanes:
            if trip == 0 or lane.news or not lane.present:
                self._hear(lane, self._turn)
            else:
                self._at(self.now + trip, _Phase.EXCHANGE, self._hear, lane, self._turn)

    def _hear(self, lane: Lane, turn: int) -> None:
        """A worker has heard of the turn: it holds it open, if that is worth it for its push."""
        has_delta = lane.pending is not None or lane.push is not None
        if may_push(lane.flags, has_delta) and lane.patience > 0:
            self._held_by.add(lane.rank)
            self._at(self.now + lane.patience, _Phase.EXCHANGE, self._release, lane, turn)
        else:
            self._let_go(lane)

    def _release(self, lane: Lane, turn: int) -> None:
        """A worker holds the turn open no longer."""
        if turn == self._turn and lane.rank in self._held_by:
            self._held_by.discard(lane.rank)
            self._let_go(lane)

    def _let_go(self, lane: Lane) -> None:
        self._awaited.discard(lane.rank)
        if not self._settings.overlap:
            self._take(lane)
        if not self._awaited:
            ready = self._network.trip(self._present) if self._settings.overlap else 0.0
            self._at(self.now + ready, _Phase.EXCHANGE, self._take_all)

    def _take_all(self) -> None:
        for lane in self.lanes:
            if lane.rank not in self._headers:
                self._take(lane)
        self._at(self.now + self._network.header_seconds(self._present), _Phase.EXCHANGE, self._exchange_deltas)

    def _take(self, lane: Lane) -> None:
        """Write a worker's header, and take what it has pushed."""
        seconds, cost = lane.exchange
        header = Header(
            lane.rank,
            self._turn,
            flags=lane.flags,
            steps=lane.steps,
            speed=lane.speed,
            exchange_seconds=seconds,
            exchange_cost=cost,
        )
        lane.news = False
        finite = True
        if lane.push is not None:
            lane.pending, lane.push = lane.push, None
            finite = self._replicas.finite(lane.rank)
        pushed = None if lane.pending is None else lane.pending.round
        self._headers[lane.rank] = add_round(header, pushed, finite)

    def _exchange_deltas(self) -> None:
        headers = [self._headers[lane.rank] for lane in self.lanes]
        groups = self._ledger.due(headers)
        senders = [header.worker for group in groups for header in group]
        self._count_bytes(senders)
        present = sorted({*self._present, *senders})
        cost = len(groups) * self._update_seconds + (self._turn_seconds if senders else 0.0)
        seconds = cost + self._network.delta_seconds(senders, present, self._elements, self._element_bytes)
        for sender in senders:
            self.lanes[sender].exchange = (seconds, cost)
        self._at(self.now + seconds, _Phase.EXCHANGE, self._publish, headers, groups)

    def _count_bytes(self, senders: Sequence[int]) -> None:
        present = self._present
        told = HEADER_BYTES * (2 if self._settings.overlap else 1)
        delta = self._elements * self._element_bytes
        sending = set(senders)
        for rank in present:
            lane, peers, sends = self.lanes[rank], len(present) - 1, rank in sending
            lane.bytes_sent += peers * (told + delta * sends)
            lane.bytes_received += peers * told + delta * (len(senders) - sends)

    def _publish(self, headers: list[Header], groups: list[list[Header]]) -> None:
        for group in self._replicas.trade(groups):
            self._observer.updated(self.now, self._ledger.apply(group))
        applied = [header for group in groups for header in group]
        dropped = [header for header in headers if Flag.DROPPED in header.flags]
        self.progress = self._ledger.close_turn(headers, applied)
        settled = sorted(header.worker for header in applied + dropped)
        self._replicas.publish(settled)
        finished = []
        for rank in settled:
            lane = self.lanes[rank]
            assert lane.pending is not None
            finished.append(self._finished(lane.rank, lane.pending))
            lane.pending = None
            lane.adoption = _Adoption(self._state.version, restart=Flag.DROPPED in headers[rank].flags)
        self._turn += 1
        self._turn_open = False
        self._headers = {}
        # Who is still to come finds work, if all others have left before it was done.
        self.over = self.progress.over and (self.progress.exhausted or self._to_come == 0)
        self._observer.finished(finished)
        for lane in self.lanes:
            if lane.present:
                self._wake(lane)
        for lane in self.lanes:
            if lane.news and not self._turn_open:
                self._tell(lane)

    def _finished(self, rank: int, push: _Push) -> FinishedRound:
        return FinishedRound(
            worker=rank,
            round=push.round.round,
            begin=push.begin,
            end=push.end,
            adopted=self.now,
            local_steps=push.round.steps,
            all_steps=push.all_steps,
            loss=push.loss / push.round.steps,
        )
